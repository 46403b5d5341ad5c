# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Speed and memory of peft-lotra, beside comparable methods and libraries.

Shown in docs/benchmarks.md.

    python examples/studies/benchmarks/run.py  # all figures, below ten minutes on two threads
    python examples/studies/benchmarks/run.py --only layers memory  # some figures; the others stay as they are
    python examples/studies/benchmarks/run.py --quick  # tiny sizes, to see that it runs: says nothing

The figures: training_step (a), layers (b), memory (c), serving (d), import_time (e); each is a module
beside this one. The subjects of a cell are timed in turn within one process, the threads are pinned, and each time is
given by its quartiles. Sizes that would take too long or too much memory are left out, with the reason. On CUDA the
times are those of the device, and the memory is that of torch's allocator.

Needs the KAN libraries of `pip install -e ".[test]"`. Run it on a machine that does nothing else.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import importlib
import os
import warnings

import torch
from figures.measure import describe_machine
from study_tools import files
from tqdm import tqdm


FIGURES = ("training_step", "layers", "memory", "serving", "import_time")


def run_figure(name: str, device: torch.device, quick: bool, bar: tqdm) -> dict:
    """Measure the cells of a figure: {"machine": ..., "rows": [settings and results of each cell]}."""
    figure = importlib.import_module(f"figures.{name}")
    machine, rows = describe_machine(device), []
    for cell in figure.cells(quick):
        bar.set_description(f"{name}: {', '.join(map(str, cell.values()))}"[:70])
        torch.compiler.reset()  # prevents a slower compilation for all sizes
        row = cell | figure.measure(cell, device, quick)
        if row.get("skipped") == {}:
            del row["skipped"]
        for subject, reason in row.get("skipped", {}).items():
            bar.write(f"{name}, {', '.join(map(str, cell.values()))}: {subject} is left out, it {reason}")
        rows.append(row)
        bar.update()
    return {"machine": machine, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__,
        takes="ten minutes on two idle cores",
        writes="DEVICE.json",
        folder=command_line.RESULTS / "benchmarks",
        needs="test",
        quick="tiny sizes: to see it run",
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="the figures to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads on the CPU (default: %(default)s)")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    device = torch.device(args.device)
    file = args.output / f"{device.type}{'_quick' if args.quick else ''}.json"
    results = files.read(file)

    total = sum(len(importlib.import_module(f"figures.{name}").cells(args.quick)) for name in args.only)
    with tqdm(total=total, unit="cell", ncols=120) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the compared libraries about themselves
        for name in args.only:
            results[name] = run_figure(name, device, args.quick, bar)

    results = {name: results[name] for name in FIGURES if name in results}
    files.replace(file, results, indent=None)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
