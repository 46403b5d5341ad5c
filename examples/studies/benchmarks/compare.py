# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Two checkouts of the package, measured side by side: does a change cost time?

    python examples/studies/benchmarks/compare.py ../before  # all cells of ours, beside those of the other checkout
    python examples/studies/benchmarks/compare.py ../before --only layers  # some figures

Each checkout runs in a process of its own, and the two take their rounds in turn, so that the drift of the machine
falls on both alike. The figures are those of `run.py`, by the code in this folder, but only of the subjects that the
package has a part in. The last columns are the ratio of the medians, and the quartiles of the ratios round by round.
Two equal checkouts differ by the noise, which `compare.py .` shows.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from figures.measure import Parts, quartiles, time_parts
from rich.console import Console
from rich.table import Table
from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[3]
FIGURES = ("training_step", "layers", "serving")
CPU = torch.device("cpu")


def make_cells(only: list[str], quick: bool) -> Iterator[tuple[str, dict[str, Parts]]]:
    """A description of each cell, and the subjects in it that the package has a part in."""
    from figures import layers, serving, subjects, training_step

    if "training_step" in only:
        for cell in training_step.cells(quick):
            if training_step.why_not_measured(cell, CPU) is None:
                parts, _ = training_step.make_subjects(cell, cell["batch"], CPU)
                ours = ("LoTRA", "full fine-tuning") if cell["kan"] == "own KAN" else ("LoTRA",)
                yield f"{cell['kan']} {cell['widths']}, batch {cell['batch']}", {name: parts[name] for name in ours}
    if "layers" in only:
        for cell in layers.cells(quick):
            layer = subjects.make_layer("KANLinear", cell["width"], cell["batch"], cell["grid"], CPU)
            yield f"layer {cell['width']}, batch {cell['batch']}", {"KANLinear": subjects.forward_backward(*layer)}
    if "serving" in only:
        for cell in serving.cells(quick):
            with tempfile.TemporaryDirectory() as folder:
                yield f"serving {cell['widths']}", serving.lotra_subjects(cell, CPU, Path(folder))


def work(only: list[str], quick: bool, threads: int) -> None:
    """The process of one checkout: a line in, a round of the cell that is open or the next cell; a line out."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    reply, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print
    for description, subjects in make_cells(only, quick):
        for parts in subjects.values():
            for _ in range(2):  # compilers and caches
                time_parts(parts, CPU)
        print(json.dumps(description), file=reply, flush=True)
        while sys.stdin.readline().strip() == "round":
            times = {name: time_parts(parts, CPU) for name, parts in subjects.items()}
            print(json.dumps(times), file=reply, flush=True)
    print("null", file=reply, flush=True)


def start(checkout: Path, arguments: list[str]) -> subprocess.Popen:
    """A process that imports the package from a checkout."""
    if not (checkout / "peft_lotra" / "__init__.py").is_file():
        sys.exit(f"{checkout} is no checkout of peft-lotra: it has no peft_lotra/__init__.py.")
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, *arguments, "--worker", str(checkout)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen, command: str | None) -> object:
    """The answer of a worker to a command, or to none."""
    if command is not None:
        worker.stdin.write(command + "\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"A worker ended with exit code {worker.wait()}: its error stands above.")
    return json.loads(line)


def compare(workers: list[subprocess.Popen], seconds: float, rounds: tuple[int, int] = (7, 200)) -> list[list[str]]:
    """A row for each part of each subject: cell, subject, part, milliseconds here and there, ratio, its quartiles."""
    rows, cells = [], [ask(worker, None) for worker in workers]
    with tqdm(unit="cell", ncols=100) as bar:
        while cells[0] is not None:
            bar.set_description(cells[0][:60])
            probe = [ask(worker, "round") for worker in workers]
            expected = sum(times["total"] for answer in probe for times in answer.values()) / 1e3
            samples = []
            for index in range(int(min(max(seconds / expected, rounds[0]), rounds[1]))):
                order = (0, 1) if index % 2 else (1, 0)
                answers = {which: ask(workers[which], "round") for which in order}
                samples.append([answers[0], answers[1]])
            for name, parts in samples[0][0].items():
                for part in parts if cells[0].startswith("serving") and len(parts) > 2 else ("total",):
                    here, there = ([pair[which][name][part] for pair in samples] for which in (0, 1))
                    ratio = quartiles([a / b for a, b in zip(here, there, strict=True)])
                    times = [quartiles(values)[1] for values in (here, there)]
                    spread = f"{ratio[0]:.3f} to {ratio[2]:.3f}"
                    rows.append(
                        [cells[0], name, part, *(f"{t:.3g}" for t in times), f"{times[0] / times[1]:.3f}", spread]
                    )
            cells = [ask(worker, "next") for worker in workers]
            bar.update()
    return rows


def main() -> None:
    parser = command_line.Parser(__doc__, takes="ten minutes on two idle cores", writes="nothing", folder=None)
    parser.add_argument("other", type=Path, help="the checkout to compare this one with")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: says nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long a cell takes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.only, args.quick, args.threads)
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    arguments = ["--only", *args.only, "--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    workers = [start(checkout, arguments) for checkout in (ROOT, args.other.resolve())]
    rows = compare(workers, 0.1 if args.quick else args.seconds)
    table = Table(title=f"milliseconds, medians; {args.threads} threads")
    for column in ("cell", "subject", "part", "here", "there", "here / there", "by round"):
        table.add_column(column, justify="left" if column in ("cell", "subject", "part") else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
