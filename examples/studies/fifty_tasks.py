# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Fifty tasks on one base that reads digits: adapters in a bank, beside heads, copies, and an MLP with LoRA.

Shown in docs/when.md.

    python examples/studies/fifty_tasks.py  # ten minutes on one core; goes on where it was stopped
    python examples/studies/fifty_tasks.py --quick  # a few seconds, for CI: says nothing

The base reads scikit-learn's digits. Ten tasks each: scans rotated by 18 to 180 degrees; noisy ones in negative; a new
name for each digit; digits in one of two random groups; pixels in another order. A task has 100 labels, and 100 to
choose by. All tasks are trained at once, keep their best values on validation data, and have the learning rate that
is the best on the validation data of the first seed. The base's answers are compared afterwards: in a batch with
adapters, in one of its own, and without the bank; beside one copy of the base that learns the tasks one after another.
Writes fifty_tasks.json and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from study_tools import files, machine
from study_tools.stacked import (
    Banked,
    Data,
    Maker,
    Tasks,
    copies,
    count,
    from_scratch,
    last_layer,
    lora,
    lotra,
    mlp_like,
    train,
)
from study_tools.tables import table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from peft_lotra.kan import KAN


torch.set_num_threads(1)  # additional threads slow down such small matrices
warnings.filterwarnings("ignore", "Adapters have more parameters")  # ranks are the same for all layers

KINDS = ("rotated", "negative", "renamed", "grouped", "permuted")
RATES = (1e-2, 3e-2, 1e-1)
METHODS: dict[str, tuple[str, Maker]] = {
    "50 heads (last layer)": ("KAN", last_layer),
    "LoTRA, r=2": ("KAN", lotra(2)),
    "LoTRA, r=4": ("KAN", lotra(4)),
    "LoTRA, r=4, from the gradient": ("KAN", lotra(4, gradient=True)),
    "LoTRA, r=(8, 8, 4), from the gradient": ("KAN", lotra((8, 8, 4), gradient=True)),
    "50 full copies": ("KAN", copies),
    "50 KANs without the base": ("KAN", from_scratch),
    "MLP, 50 heads": ("MLP", last_layer),
    "MLP, LoRA, r=4": ("MLP", lora(4)),
    "MLP, LoRA, r=16": ("MLP", lora(16)),
    "MLP, 50 full copies": ("MLP", copies),
}


@dataclass
class Digits:
    """The data of the base, to train and to test, and the tasks."""

    train: Data
    test: Data
    tasks: Tasks


def losses(predictions: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(predictions.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def make_task(kind: str, place: int, rng: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> Data:
    """All images, as the task shows and names them."""
    if kind == "rotated":
        images = rotate(images, 18 * (place + 1), axes=(1, 2), reshape=False, order=1)
    elif kind == "negative":
        images = 16 - images + rng.normal(0, 1 + 0.5 * place, images.shape)
    elif kind == "renamed":
        labels = rng.permutation(10)[labels]
    elif kind == "grouped":
        labels = (rng.permutation(10) < 5)[labels].astype(np.int64)
    else:
        images = images.reshape(-1, 64)[:, rng.permutation(64)]
    x = torch.tensor(images.reshape(-1, 64).clip(0, 16) / 8 - 1, dtype=torch.float32)
    return x, torch.tensor(labels)


def digits(seed: int, each: int) -> Digits:
    images, labels = load_digits(return_X_y=True)
    images, rng = images.reshape(-1, 8, 8), np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    known, free, test = order[:800], order[800:1200], order[1200:]
    parts: list[list[Data]] = [[], [], []]
    for kind in KINDS:
        for place in range(each):
            x, y = make_task(kind, place, rng, images, labels)
            own = rng.permutation(free)
            for part, rows in zip(parts, (own[:100], own[100:200], test), strict=True):
                part.append((x[rows], y[rows]))
    tasks = Tasks(*((torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in parts), losses)
    x, y = torch.tensor(images.reshape(-1, 64) / 8 - 1, dtype=torch.float32), torch.tensor(labels)
    return Digits((x[known], y[known]), (x[test], y[test]), tasks)


def fit(model: nn.Module, data: Data, steps: int, lr: float) -> nn.Module:
    """Train all parameters by AdamW on batches of 64."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
        scheduler.step()
    return model


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], data: Data) -> Tensor:
    """In %, of one task, or of each of (tasks, rows)."""
    return 100 * (model(data[0]).argmax(-1) == data[1]).float().mean(-1)


@torch.no_grad()
def changes(method: Banked, base: nn.Module, before: Tensor, x: Tensor) -> dict[str, float]:
    """How much the base's answers differ from those before the training."""
    alone = torch.full((len(x),), -1)
    # every second row of the batch has an adapter
    mixed = torch.stack([alone, method.ids[torch.arange(len(x)) % len(method.ids)]], 1).flatten()
    found = {
        "rows of the base beside adapters": method.model(x.repeat_interleave(2, 0), ids=mixed)[::2],
        "a batch of the base": method.model(x, ids=alone),
    }
    method.bank.detach()
    found["after detach"] = base(x)
    return {name: (y - before).abs().max().item() for name, y in found.items()}


def run(found: dict, seed: int, each: int, steps: int, save: Callable[[], None]) -> None:
    """Add the accuracies of one seed."""
    data = digits(seed, each)
    tasks = data.tasks
    torch.manual_seed(seed)
    kan = KAN([64, 32, 10])
    bases = {"KAN": kan, "MLP": mlp_like(kan)}
    for base in bases.values():
        fit(base, data.train, 4 * steps, 5e-3).requires_grad_(False)
    rows = found.setdefault("methods", {})

    def record(row: dict, model: Callable[[Tensor], Tensor]) -> None:
        scores = accuracy(model, tasks.test).view(len(KINDS), each).mean(1).tolist()
        row.setdefault("test", {})[str(seed)] = dict(zip(KINDS, scores, strict=True))

    for name, base in bases.items():
        row = rows.setdefault(f"the {name} alone", {"numbers": count(base), "own task": {}})
        row["own task"][str(seed)] = accuracy(base, data.test).item()
        record(row, base)
    before = bases["KAN"](data.test[0])
    for name, (kind, maker) in tqdm(METHODS.items(), unit="method", ncols=100, desc=f"seed {seed}"):
        row = rows.setdefault(name, {"validation": {}, "seconds": {}})
        if str(seed) in row.get("test", {}):
            continue
        results = {}
        for lr in RATES if seed == 0 else (row["lr"],):
            torch.manual_seed(100 + seed)
            method, done = train(maker, bases[kind], tasks, lr, steps, rows=32)
            results[lr] = (accuracy(method, tasks.validation).mean().item(), accuracy(method, tasks.test), done)
            if seed == 0:
                row["validation"][f"{lr:g}"] = results[lr][0]
            if isinstance(method, Banked):
                row.setdefault("change of the base", {})[str(seed)] = changes(method, kan, before, data.test[0])
        row["lr"] = lr = max(results, key=lambda lr: results[lr][0])
        scores, done = results[lr][1:]
        scores = scores.view(len(KINDS), each).mean(1).tolist()
        row.setdefault("test", {})[str(seed)] = dict(zip(KINDS, scores, strict=True))
        row["seconds"][str(seed)], row["bytes"] = done["seconds"], done["bytes"]
        save()
    row = rows.setdefault("one copy, the tasks in turn", {"own task": {}})
    if str(seed) in row["own task"]:
        return
    one = copy.deepcopy(kan).requires_grad_(True)
    for x, y in zip(*tasks.train, strict=True):
        fit(one, (x, y), steps, rows["50 full copies"]["lr"])
    row["own task"][str(seed)] = accuracy(one, data.test).item()
    record(row, one)
    save()


def as_text(found: dict) -> str:
    """The table in Markdown."""
    lines = []
    for name, row in found["methods"].items():
        if "test" not in row:
            continue
        scores = np.array([[one[kind] for kind in KINDS] for one in row["test"].values()])
        cells = [name, f"{row['bytes']:,}" if "bytes" in row else "", f"{row['lr']:g}" if "lr" in row else ""]
        cells += [f"{value:.1f}" for value in (*scores.mean(0), scores.mean())]
        cells.append(" ".join(f"{value:.1f}" for value in scores.mean(1)))
        cells += [f"{np.mean([*row[key].values()]):.1f}" if key in row else "" for key in ("own task", "seconds")]
        lines.append(cells)
    most: dict[str, float] = {}
    for row in found["methods"].values():
        for one in row.get("change of the base", {}).values():
            most = {name: max(value, most.get(name, 0.0)) for name, value in one.items()}
    told = ", ".join(f"{name} {value:g}" for name, value in most.items())
    header = (
        f"| | bytes of a task | lr | {' | '.join(KINDS)} | all, % | seeds | the base's own task, % | CPU seconds |"
    )
    note = f"The most that an answer of the base changed by the training of the banks: {told}."
    return f"{table(header, lines)}\n{note}\n"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="ten minutes on one core",
        writes="fifty_tasks.json and .md; with --quick fifty_tasks_quick.*",
        folder=command_line.RESULTS,
        quick="ten tasks, four steps, one seed: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    args = parser.parse_args()
    each, steps, seeds = (2, 4, 1) if args.quick else (10, 120, args.seeds)

    path: Path = files.path_of(args, "fifty_tasks")
    found = files.read(path, args.quick)
    about = {"machine": machine.describe(), "steps": steps}

    for seed in range(seeds):
        run(found, seed, each, steps, lambda: files.write(path, found | about))
    files.write_page(path, as_text(found))


if __name__ == "__main__":
    main()
