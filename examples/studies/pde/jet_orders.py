# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost of derivatives by their order: `jet` beside nested autograd, at 2000 points, float32, value and backward.

Shown in docs/benchmarks.md.

All derivatives up to the order along both inputs, of a KAN [2, 16, 16, 1] of splines of degree 5, and of a tanh MLP
with three layers of 25. Medians of 10, the subjects taking turns.

    python examples/studies/pde/jet_orders.py  # half a minute
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
import time
from collections.abc import Callable

import torch
from study_tools import files
from study_tools.tables import table
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet


ORDERS = (1, 2, 3, 4)


def nested(model: nn.Module, x: Tensor, order: int) -> list[Tensor]:
    """The parts of a jet of one output, by differentiating a graph `order` times along each input."""
    x = x.clone().requires_grad_()
    parts = [model(x)]
    for i in range(x.shape[1]):
        slope = parts[0]
        for _ in range(order):
            slope = torch.autograd.grad(slope.sum(), x, create_graph=True)[0][:, i : i + 1]
            parts.append(slope)
    return parts


def milliseconds(parts_of: Callable[..., list[Tensor]], model: nn.Module, x: Tensor, order: int) -> float:
    """Of CPU time, for the parts, the sum of their squares, and its gradient."""
    started = time.process_time()
    model.zero_grad()
    sum(part.square().mean() for part in parts_of(model, x, order=order)).backward()
    return 1000 * (time.process_time() - started)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half a minute",
        writes="jet_orders.json",
        folder=command_line.RESULTS / "pde",
        quick="two repetitions: to see it run",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.rand(2000, 2) * 2 - 1
    inner = [layer for _ in range(2) for layer in (nn.Linear(25, 25), nn.Tanh())]
    models = {
        "KAN": KAN([2, 16, 16, 1], spline_order=5),
        "MLP": nn.Sequential(nn.Linear(2, 25), nn.Tanh(), *inner, nn.Linear(25, 1)),
    }
    subjects = [(name, way, order) for name in models for way in (jet, nested) for order in ORDERS]
    runs: dict[tuple, list[float]] = {subject: [] for subject in subjects}
    for _ in range(2 if args.quick else 10):
        for name, way, order in subjects:
            # the last of three counts: those before bring its memory into the caches, as in a training
            runs[name, way, order].append([milliseconds(way, models[name], x, order) for _ in range(3)][-1])
    rows = {}
    for name in models:
        for way in (jet, nested):
            medians = [round(statistics.median(runs[name, way, order]), 1) for order in ORDERS]
            rows[f"{name}, {way.__name__}"] = medians
    header = f"| CPU ms | {' | '.join(f'order {order}' for order in ORDERS)} |"
    print(table(header, ([name, *medians] for name, medians in rows.items())))
    files.write(files.path_of(args, "jet_orders"), {"orders": ORDERS, "milliseconds": rows})


if __name__ == "__main__":
    main()
