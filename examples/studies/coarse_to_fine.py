# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters that are trained on a coarse grid, and refined, beside adapters on one grid.

    python examples/studies/coarse_to_fine.py  # four minutes on one core
    python examples/studies/coarse_to_fine.py --quick  # seconds, for a look

A KAN [2, 8, 8, 1] fits the front tanh((x - a y) / 0.1) cos(2 y) at a = 0.2,
and is adapted to a = 0.7 by Levenberg-Marquardt in 60 steps, ranks (8, 8, 6),
on 2,000 points. `refine_grid` carries the adapters from 5 to 10 and 20
intervals. The error is on 2,000 other points. Writes coarse_to_fine.json
and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import statistics
import time
import warnings

import torch
from peft import get_peft_model
from study_tools import files, machine
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, refine_grid
from peft_lotra.optim import LevenbergMarquardt


LEVELS = {
    "5 intervals": [(5, 60)],
    "20 intervals": [(20, 60)],
    "5, then 10, then 20": [(5, 20), (10, 20), (20, 20)],
}


def front(x: Tensor, a: float) -> Tensor:
    return torch.tanh((x[:, :1] - a * x[:, 1:]) / 0.1) * torch.cos(2 * x[:, 1:])


def points(count: int) -> Tensor:
    return 2 * torch.rand(count, 2, dtype=torch.float64) - 1


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    def residual(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return network(x) - y

    trainer = LevenbergMarquardt(model, 1e-3)
    trainer.fit([(residual, (x, y))], steps, progress=False)


def run(seed: int, share: float) -> dict[str, dict[str, float]]:
    """The error and CPU seconds of each way; `share` of the steps."""
    torch.manual_seed(seed)
    x, test = points(2000), points(2000)
    base = KAN([2, 8, 8, 1], norm="tanh", dtype=torch.float64)
    fit(base, x, front(x, 0.2), round(60 * share))
    wanted = front(test, 0.7)
    found = {}
    for name, levels in LEVELS.items():
        torch.manual_seed(seed)
        kan = copy.deepcopy(base)
        first = levels[0][0]
        if first != 5:
            refine_grid(kan, first)
        with warnings.catch_warnings():  # more numbers than some layers have
            warnings.simplefilter("ignore")
            model = get_peft_model(kan, LoTRAConfig(r=(8, 8, 6)))
        start = time.process_time()
        for size, steps in levels:
            if size != first:
                refine_grid(model, size)
            fit(model, x, front(x, 0.7), round(steps * share))
        seconds = time.process_time() - start
        with torch.no_grad():
            error = (model(test) - wanted).norm() / wanted.norm()
        found[name] = {"error": error.item(), "cpu_seconds": seconds}
    return found


def table(results: dict) -> str:
    lines = ["| grid | median error | worst | CPU s |", "|---|--:|--:|--:|"]
    for name in LEVELS:
        rows = [row[name] for row in results["seeds"]]
        errors = [row["error"] for row in rows]
        seconds = statistics.median(row["cpu_seconds"] for row in rows)
        middle = statistics.median(errors)
        cells = f"{middle:.1e} | {max(errors):.1e} | {seconds:.0f}"
        lines.append(f"| {name} | {cells} |")
    count = len(results["seeds"])
    lines += ["", f"{count} seeds. {results['machine']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="four minutes on one core",
        writes="coarse_to_fine.json and .md",
        folder=command_line.RESULTS,
        quick="one seed and a tenth of the steps",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, share = (1, 0.1) if args.quick else (5, 1.0)
    rows = [run(seed, share) for seed in tqdm(range(seeds))]
    results = {"machine": machine.describe(), "seeds": rows}
    files.write(args.output / "coarse_to_fine.json", results)
    files.write_page(args.output / "coarse_to_fine.md", table(results))


if __name__ == "__main__":
    main()
