# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A Slim layer beside the dense one: training step, inference and peak memory, in one run.

Shown in docs/slim.md.

    python examples/studies/benchmarks/slim_speed.py  # half a minute; threads as torch chooses, or --threads
    python examples/studies/benchmarks/slim_speed.py --quick  # a small layer, to see that it runs

Subjects take turns, and medians count; memory is measured in separate processes. A step is a forward pass, a backward
pass (with the gradient of the input) and an update by Adam.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import json
import sys

import torch
from figures.measure import describe_machine, in_child, interleave, peak_memory
from figures.subjects import random_inputs
from study_tools import files
from study_tools.tables import table

from peft_lotra.kan import KANLinear, SlimKANLinear


CPU = torch.device("cpu")


def make(name: str, width: int, ranks: list[int]) -> torch.nn.Module:
    torch.manual_seed(0)
    return KANLinear(width, width) if name == "dense" else SlimKANLinear(width, width, tuple(ranks))


def parts(layer: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> dict:
    """The measured parts of a layer: its training step and its inference."""

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        layer(x).square().mean().backward()
        optimizer.step()

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    return {"training step": step, "inference": inference}


def subject(name: str, width: int, batch: int, ranks: list[int]) -> tuple:
    """A layer, its optimizer and inputs: the arguments of `parts`."""
    layer = make(name, width, ranks)
    return layer, torch.optim.Adam(layer.parameters(), lr=1e-3), random_inputs(batch, width, CPU).requires_grad_()


def run_child(cell: dict, part: str) -> float:
    """The peak of the part in MiB, without the layer, its inputs and, for the step, the state of the optimizer."""
    layer, optimizer, x = subject(**cell)
    for few in (8, 12):  # thread pools, and the state of the optimizer
        parts(layer, optimizer, x.detach()[:few].requires_grad_())[part]()
    layer.zero_grad()
    return round(peak_memory(parts(layer, optimizer, x)[part], CPU), 1)


def peaks(name: str, cell: dict, threads: int) -> dict[str, float]:
    child = [__file__, "--child", json.dumps({"name": name, **cell})]
    return {part: in_child([*child, part], threads)["mib"] for part in ("training step", "inference")}


def as_text(result: dict) -> str:
    cell, lines = result["cell"], []
    for part in ("training step", "inference"):
        for label, values in (
            ("ms", {name: times[part][1] for name, times in result["ms"].items()}),
            ("peak memory, MiB", {name: by_part[part] for name, by_part in result["mib"].items()}),
        ):
            dense, slim = values["dense"], values["slim"]
            share = f"{slim / dense:.2f}" if dense else "-"
            lines.append([f"{part}, {label}", f"{dense:.1f}", f"{slim:.1f}", share])
    # Adam keeps two more numbers for each parameter
    for part, copies, label in (("training step", 3, "parameters and Adam's state"), ("inference", 1, "parameters")):
        sizes = {n: copies * 4 * count / 2**20 for n, count in result["parameters"].items()}
        held = {n: by_part[part] + sizes[n] for n, by_part in result["mib"].items()}
        share = f"{held['slim'] / held['dense']:.2f}"
        lines.append([f"{part}, MiB with {label}", *(f"{mib:.1f}" for mib in held.values()), share])
    lines.append(["parameters", *(f"{n:,}" for n in result["parameters"].values()), ""])
    title = f"{cell['width']} -> {cell['width']}, batch {cell['batch']}, ranks {tuple(cell['ranks'])}"
    return table(f"| {title} | dense | Slim | Slim / dense |", lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half a minute",
        writes="slim_speed.json",
        folder=command_line.RESULTS,
        quick="a small layer: to see it run",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="for the timed rounds (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cell = {"width": 512, "batch": 1024, "ranks": [32, 32, 6]}
    seconds = args.seconds
    if args.quick:
        cell, seconds = {"width": 32, "batch": 64, "ranks": [4, 4, 3]}, 0.1
    names = ("dense", "slim")
    result = {
        "machine": describe_machine(CPU),
        "cell": cell,
        "parameters": {n: sum(p.numel() for p in make(n, cell["width"], cell["ranks"]).parameters()) for n in names},
        **interleave({n: parts(*subject(n, **cell)) for n in names}, CPU, seconds, rounds=(5, 100)),
        "mib": {n: peaks(n, cell, args.threads) for n in names},
    }
    files.write(files.path_of(args, "slim_speed"), result)
    print(as_text(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps({"mib": run_child(json.loads(sys.argv[2]), sys.argv[3])}))
    else:
        main()
