# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Gradient initialization beside random factors and full fine-tuning, each at its best learning rates.

Shown in docs/training.md.

    python examples/studies/initialization.py  # a quarter of an hour on one core, no network
    python examples/studies/initialization.py --data-dir PATH/TO/mnist  # one more shift: digits to MNIST at 8x8
    python examples/studies/initialization.py --quick  # a few seconds, for CI: says nothing
    python examples/studies/initialization.py --only pykan  # one part

A KAN is trained, then adapted to a real change of its data with few labels: scikit-learn's digits rotated by 30
degrees (200 labels), the same with noise (the quickstart's shift), and MNIST brought to 8x8 (500 labels). LoTRA starts
from random factors or from the gradient (`start_from_gradient`, one pass over the labeled data), at two ranks. Full
fine-tuning and both starts get several learning rates, both starts also three ratios of the components' rates. Shown
is the best mean over the seeds of each, chosen by these same test scores for every method alike, and what the fixed
setting SETTING gives. The quickstart's shift is repeated on KANs of two other libraries, with few rates.
Seeds that the file has are not repeated. Writes initialization.json.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import argparse
import copy
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from study_tools import files, together
from study_tools.tables import table
from study_tools.tasks import Task, build, digits_to_mnist, rotated_digits, score
from torch import nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient


torch.set_num_threads(1)  # additional threads slow down such small matrices

RANKS = ((8, 8, 4), (16, 16, 6))
FULL_RATES = (5e-3, 1e-2, 2e-2, 3e-2)
RATES = (5e-3, 1e-2)
POLICIES = {
    "uniform": "uniform",
    "slow core": {"core": 0.03, "factor_out": 0.5},
    "less slow core": {"core": 0.1, "factor_out": 0.5},
}
SETTING = "slow core, lr 0.01"
Adam = partial(torch.optim.Adam, fused=True)


Trained = tuple[nn.Module, torch.optim.Optimizer]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, steps: int) -> nn.Module:
    rows = [together.draw(task.after, steps)]
    together.train([model], [optimizer], together.batches([task.after], rows), task.loss, steps)
    return model


def pretrain(library: str, task: Task, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    base = build(library, task.widths)
    before = Task("", task.widths, (), task.before, (), task.loss)
    return train(base, torch.optim.Adam(base.parameters(), lr=5e-3), before, 2 * steps)


def full(base: nn.Module, task: Task, lr: float) -> Trained:
    model = copy.deepcopy(base)
    return model, Adam(model.parameters(), lr=lr)


def lotra(base: nn.Module, task: Task, r: tuple[int, int, int], start: str, policy: str, lr: float) -> Trained:
    """LoTRA from the start "random" or "gradient"."""
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=r))
    if start == "gradient":
        start_from_gradient(model, lambda: task.loss(model(task.after[0]), task.after[1]))
    return model, create_lotra_optimizer(model, Adam, lr=lr, policy=POLICIES[policy])


Rows = dict[str, dict[str, list[float]]]  # the score of each seed, by method and setting


def compare(make: Callable[[int], Task], library: str, args: argparse.Namespace, bar: tqdm, rows: Rows) -> None:
    """Add the seeds that are not there of all methods on one shift; the settings of a method train at once.

    The KANs of other libraries are slow and get one setting of LoTRA.
    """
    every = library == "peft-lotra"
    methods: dict[str, dict[str, Callable[..., Trained]]] = {
        "full fine-tuning": {f"lr {lr:g}": partial(full, lr=lr) for lr in (FULL_RATES if every else FULL_RATES[1:3])}
    }
    for r, start in itertools.product(RANKS, ("random", "gradient")):
        settings = {
            f"{policy}, lr {lr:g}": partial(lotra, r=r, start=start, policy=policy, lr=lr)
            for policy, lr in itertools.product(POLICIES, RATES)
        }
        methods[f"{start} {r}"] = settings if every else {SETTING: settings[SETTING]}
    for seed in range(len(rows.get("base", {}).get("", [])), args.seeds):
        task = make(seed)
        base = pretrain(library, task, seed, args.steps)
        for method, settings in methods.items():
            models, groups, draws = [], [], []
            for prepare in settings.values():
                torch.manual_seed(100 + seed)
                model, optimizer = prepare(base, task)
                models.append(model)
                groups += optimizer.param_groups
                draws.append(together.draw(task.after, args.steps))
            batches = together.batches([task.after] * len(models), draws)
            together.train(models, [torch.optim.Adam(groups)], batches, task.loss, args.steps)
            for setting, model in zip(settings, models, strict=True):
                rows.setdefault(method, {}).setdefault(setting, []).append(score(model, task))
            bar.update(len(models))
        rows.setdefault("base", {}).setdefault("", []).append(score(base, task))


def best(settings: dict[str, list[float]]) -> str:
    """The setting with the best mean over the seeds."""
    return max(settings, key=lambda setting: np.mean(settings[setting]))


def as_text(results: dict[str, Rows]) -> str:
    """The best setting of each method, its mean and its seeds, and the mean at the fixed setting."""
    parts = []
    for part, rows in results.items():
        lines = []
        for method, settings in rows.items():
            setting = best(settings)
            fixed = f"{np.mean(settings[SETTING]):.2f}" if SETTING in settings else ""
            seeds = " ".join(f"{value:.1f}" for value in settings[setting])
            lines.append([method, setting, f"{np.mean(settings[setting]):.2f}", seeds, fixed])
        header = f"| {part} | best setting | best | seeds | at {SETTING} |"
        parts.append(table(header, lines))
    return "\n".join(parts)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="a quarter of an hour on one core",
        writes="initialization.json; with --quick initialization_quick.json",
        folder=command_line.RESULTS,
        needs="test",
        quick="one seed, few steps, one part: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each adaptation (default: 300)")
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, for one more shift")
    parser.add_argument("--only", help="the parts whose names contain this")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = 1, 5

    noisy = partial(rotated_digits, angle=30)
    parts: dict[str, Callable[[tqdm, Rows], None]] = {
        "digits, rotated by 30 degrees": partial(
            compare, partial(rotated_digits, angle=30, noise=0, hidden=48), "peft-lotra", args
        ),
        "digits, rotated and noisy (quickstart)": partial(compare, noisy, "peft-lotra", args),
    }
    if args.data_dir is not None:
        mnist = partial(digits_to_mnist, folder=args.data_dir)
        parts["digits to MNIST"] = partial(compare, mnist, "peft-lotra", args)
    for library in ("efficient-kan", "efficient-kan with scales", "pykan"):
        parts[f"{library}: rotated and noisy"] = partial(compare, noisy, library, args)
    if args.quick:
        parts = {name: parts[name] for name in list(parts)[1:2]}
    if args.only is not None:
        parts = {name: part for name, part in parts.items() if args.only in name}

    path = files.path_of(args, "initialization")
    results = files.read(path, args.quick).get("results", {})
    bar = tqdm(unit="run", ncols=100)
    for name, part in parts.items():
        bar.set_description(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pykan's own
            part(bar, results.setdefault(name, {}))
        setting = {"steps": args.steps, "policies": POLICIES, "setting": SETTING}
        files.write(path, {"setting": setting, "results": results})
    bar.close()
    print(as_text(results))


if __name__ == "__main__":
    main()
