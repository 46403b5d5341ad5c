# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A Slim layer beside the dense one: training step, inference and peak memory, in one run.

    python examples/benchmarks/slim_speed.py            # half a minute; threads as torch chooses, or --threads
    python examples/benchmarks/slim_speed.py --quick    # a small layer, to see that it runs

Subjects take turns, medians count; memory is that of a process of its own. The step is forward pass, backward pass
(towards the input too) and an update by Adam.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from measure import describe_machine, in_child, interleave, peak_memory
from rich.console import Console
from rich.table import Table
from subjects import random_inputs

from peft_lotra.kan import KANLinear, SlimKANLinear


CPU = torch.device("cpu")


def make(name: str, width: int, ranks: tuple[int, int, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    return KANLinear(width, width) if name == "dense" else SlimKANLinear(width, width, tuple(ranks))


def parts(name: str, width: int, batch: int, ranks: tuple[int, int, int]) -> dict:
    """What is measured of a layer: its training step and its inference."""
    layer, x = make(name, width, ranks), random_inputs(batch, width, CPU).requires_grad_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        layer(x).square().mean().backward()
        optimizer.step()

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    return {"training step": step, "inference": inference}


def run_child(cell: dict) -> dict:
    """MiB that each part needs at its peak beyond layer, inputs and, for the step, the optimizer's state."""
    peaks = {}
    for part in ("training step", "inference"):
        step = parts(**cell)[part]
        step()  # thread pools, and the state of the optimizer
        peaks[part] = round(peak_memory(step, CPU), 1)
    return peaks


def show(console: Console, result: dict) -> None:
    cell = result["cell"]
    table = Table(title=f"{cell['width']} -> {cell['width']}, batch {cell['batch']}, ranks {tuple(cell['ranks'])}")
    for column in ("", "dense", "Slim", "Slim / dense"):
        table.add_column(column, justify="right" if column else "left")
    for part in ("training step", "inference"):
        for label, unit, values in (
            ("", "ms", {name: times[part][1] for name, times in result["ms"].items()}),
            (", peak memory", "MiB", {name: peaks[part] for name, peaks in result["mib"].items()}),
        ):
            dense, slim = values["dense"], values["slim"]
            share = f"{slim / dense:.2f}" if dense else "-"
            table.add_row(f"{part}{label}", f"{dense:.1f} {unit}", f"{slim:.1f} {unit}", share)
    table.add_row("parameters", *(f"{n:,}" for n in result["parameters"].values()), "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="for the timed rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cell = {"width": 512, "batch": 1024, "ranks": [32, 32, 6]}
    name, seconds = "slim_speed", args.seconds
    if args.quick:
        cell, name, seconds = {"width": 32, "batch": 64, "ranks": [4, 4, 3]}, "slim_speed_quick", 0.1
    names = ("dense", "slim")
    result = {
        "machine": describe_machine(CPU),
        "cell": cell,
        "parameters": {n: sum(p.numel() for p in make(n, cell["width"], cell["ranks"]).parameters()) for n in names},
        **interleave({n: parts(n, **cell) for n in names}, CPU, seconds, rounds=(5, 100)),
        "mib": {n: in_child([__file__, "--child", json.dumps({"name": n, **cell})], args.threads) for n in names},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    console = Console(width=100)
    show(console, result)
    console.print(f"written: {args.output / name}.json")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_child(json.loads(sys.argv[2]))))
    else:
        main()
