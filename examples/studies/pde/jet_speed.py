# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""Jets beside nested autograd: Laplacian and backward, 2000 points, a [2, 16, 16, 1] KAN, float32, medians of 20.

Then value and Laplacian together, compiled and not.

    python examples/studies/pde/jet_speed.py  # two minutes, most of them the compiler's
"""

from __future__ import annotations

from problems import command_line  # isort: split


import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from study_tools import machine
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet, laplacian


NESTED = "nested autograd"


def nested(model: nn.Module, x: Tensor) -> Tensor:
    """The Laplacian by differentiating a graph twice."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    columns = gradient.unbind(-1)
    return sum(torch.autograd.grad(c.sum(), x, create_graph=True)[0][:, i] for i, c in enumerate(columns))


def value_and_laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """Their sum, as of a PDE with a reaction term."""
    u, _, second = jet(model, x, collapse=True)
    return u + second


def milliseconds(function: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    function().square().mean().backward()
    return 1000 * (time.perf_counter() - started)


def measure(threads: int, compiled: bool, repetitions: int) -> dict[str, float]:
    """Medians in milliseconds; the subjects take turns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x = KAN([2, 16, 16, 1]), torch.rand(2000, 2) * 2 - 1
    function = torch.compile(lambda x: laplacian(model, x)) if compiled else lambda x: laplacian(model, x)
    runs = {"jet, compiled" if compiled else "jet": lambda: function(x), NESTED: lambda: nested(model, x)}
    try:
        from qkan.kan import KAN as EfficientKAN

        other = EfficientKAN([2, 16, 16, 1])
        runs[f"{NESTED}, efficient-kan"] = lambda: nested(other, x)
        if not compiled:
            runs["jet, efficient-kan"] = lambda: laplacian(other, x)
    except ImportError:
        pass
    both = lambda x: value_and_laplacian(model, x)  # noqa: E731
    runs["value and Laplacian"] = lambda: both(x)
    if compiled:
        compiled_both = torch.compile(both)
        runs["value and Laplacian, compiled"] = lambda: compiled_both(x)
    for _ in range(2):
        for run in runs.values():
            milliseconds(run)
    rounds = [{name: milliseconds(run) for name, run in runs.items()} for _ in range(repetitions)]
    return {name: statistics.median(line[name] for line in rounds) for name in runs}


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two minutes, most of them the compiler's",
        writes="jet_speed.json",
        folder=command_line.RESULTS / "pde",
        needs="test",
        quick="few repetitions, without the compiler: to see it run",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    results = []
    table = Table(title="Laplacian + backward")
    for name in ("threads", "", "ms", "nested / this", "efficient-kan / this"):
        table.add_column(name, justify="right" if name else "left")
    # compiled last, since the compiler slows down each later call of a Python function in the process
    for compiled in (False,) if args.quick else (False, True):
        for threads in args.threads:
            medians = measure(threads, compiled, repetitions=2 if args.quick else 20)
            results.append({"threads": threads, "milliseconds": medians})
            rivals = [medians[name] for name in (NESTED, f"{NESTED}, efficient-kan") if name in medians]
            for name, value in medians.items():
                ratios = [f"{rival / value:.1f}" for rival in rivals]
                table.add_row(str(threads), name, f"{value:.1f}", *ratios, end_section=name == list(medians)[-1])
    Console().print(table)
    name = "jet_speed_quick" if args.quick else "jet_speed"
    results = {"machine": machine.describe(), "rows": results}
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
