# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Few labels: what to train of a KAN, and of an MLP of equal size, when a new task has 20 to 200 labels.

    python examples/studies/few_labels.py  # ten minutes on one core, no network; goes on where it was stopped
    python examples/studies/few_labels.py --quick  # a few seconds, for CI: says nothing

A network that reads scikit-learn's digits 0 to 4 learns to read 5 to 9; one that predicts the progression of diabetes
for the younger half of the patients learns that of the older half. Compared are LoTRA from a random start and from
the gradient (`start_from_gradient`), the last layer alone, full fine-tuning, and of the MLP full fine-tuning and LoRA.
Each method has three learning rates; validation data choose one, by the mean over the seeds, and test data count
nowhere else. Writes few_labels.json and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_diabetes, load_digits
from study_tools import machine
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


torch.set_num_threads(1)  # additional threads slow down such small matrices
warnings.filterwarnings("ignore", "Adapters have more parameters")  # ranks are the same for all tasks

Data = tuple[Tensor, Tensor]
DEFAULT_RATE = 3e-2  # of the examples in the documentation


@dataclass
class Split:
    """The old task, and the new one's labels, validation and test data."""

    widths: list[int]
    old: Data
    labeled: Data
    validation: Data
    test: Data
    loss: Callable[[Tensor, Tensor], Tensor]

    @torch.no_grad()
    def score(self, model: nn.Module, data: Data) -> float:
        """The accuracy, or the share of the variance that is explained, in %."""
        y = model(data[0])
        if self.loss is F.cross_entropy:
            return 100 * (y.argmax(1) == data[1]).float().mean().item()
        return 100 * (1 - self.loss(y, data[1]) / data[1].var(correction=0)).item()


def parts(x: Tensor, y: Tensor, seed: int, labels: int, first: int, second: int) -> list[Data]:
    """The labeled, validation and test data, of which the second and the third do not depend on the labels."""
    order = torch.tensor(np.random.default_rng(seed).permutation(len(y)))
    return [(x[rows], y[rows]) for rows in (order[:labels], order[first:second], order[second:])]


def digits(seed: int, labels: int) -> Split:
    images, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(targets)
    new = y > 4
    return Split([64, 32, 5], (x[~new], y[~new]), *parts(x[new], y[new] - 5, seed, labels, 200, 400), F.cross_entropy)


def diabetes(seed: int, labels: int) -> Split:
    records, targets = load_diabetes(return_X_y=True)
    x = torch.tensor((records / records.std(0) / 3).clip(-1, 1), dtype=torch.float32)
    y = torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)[:, None]
    old = x[:, 0] > x[:, 0].median()
    return Split([10, 32, 1], (x[~old], y[~old]), *parts(x[old], y[old], seed, labels, 60, 120), F.mse_loss)


TASKS = {"digits 0-4 to 5-9": (digits, (20, 50, 200)), "diabetes, younger to older": (diabetes, (50,))}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_mlp(widths: list[int]) -> nn.Module:
    """An MLP of one hidden layer with as many parameters as the KAN of these widths."""
    inputs, _, outputs = widths
    hidden = round((count(KAN(widths)) - outputs) / (inputs + outputs + 1))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


Trained = tuple[nn.Module, torch.optim.Optimizer]


def lotra(r: int | tuple[int, ...], gradient: bool, base: nn.Module, split: Split, lr: float) -> Trained:
    model = get_peft_model(base, LoTRAConfig(r=r))
    if gradient:
        start_from_gradient(model, lambda: split.loss(model(split.labeled[0]), split.labeled[1]))
    return model, create_lotra_optimizer(model, torch.optim.Adam, lr=lr)


def last_layer(base: nn.Module, split: Split, lr: float) -> Trained:
    base.requires_grad_(False)
    base.layers[-1].requires_grad_(True)
    return full(base, split, lr)


def lora(base: nn.Module, split: Split, lr: float) -> Trained:
    return full(get_peft_model(base, LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"])), split, lr)


def full(base: nn.Module, split: Split, lr: float) -> Trained:
    return base, torch.optim.Adam([p for p in base.parameters() if p.requires_grad], lr=lr)


Method = Callable[[nn.Module, Split, float], Trained]
RATES = (1e-2, 3e-2, 1e-1)
METHODS: dict[str, tuple[Callable, Method, tuple[float, ...]]] = {
    "KAN, full fine-tuning": (KAN, full, RATES),
    "KAN, last layer": (KAN, last_layer, RATES),
    "LoTRA, random start, r=4": (KAN, partial(lotra, 4, False), RATES),
    "LoTRA, gradient start, r=4": (KAN, partial(lotra, 4, True), RATES),
    "LoTRA, gradient start, r=(8, 8, 4)": (KAN, partial(lotra, (8, 8, 4), True), RATES),
    "MLP, full fine-tuning": (make_mlp, full, (3e-3, 1e-2, 3e-2)),
    "MLP, LoRA, r=3": (make_mlp, lora, RATES),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, split: Split, steps: int) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (128,))
        optimizer.zero_grad()
        split.loss(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
        scheduler.step()


def make_base(make: Callable, split: Split, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    base = make(split.widths)
    train(base, torch.optim.Adam(base.parameters(), lr=5e-3), split.old, split, 2 * steps)
    return base


Run = tuple[str, int, str, float, int]  # task, labels, method, lr, seed


def runs(seeds: int, labels: int | None) -> Iterator[Run]:
    """All runs; those of one base follow each other."""
    for task, (_, counts) in TASKS.items():
        for seed in range(seeds):
            for number in counts if labels is None else (labels,):
                for method, (_, _, rates) in METHODS.items():
                    yield from ((task, number, method, lr, seed) for lr in rates)


def run_all(todo: list[Run], found: dict[str, dict], steps: int, save: Callable[[], None]) -> None:
    """Adds the scores of the runs, by method, to those that were found."""
    bases: dict[tuple, nn.Module] = {}
    for task, labels, method, lr, seed in tqdm(todo, unit="run", ncols=100):
        make, adapt, _ = METHODS[method]
        split = TASKS[task][0](seed, labels)
        if (task, make, seed) not in bases:
            bases[task, make, seed] = make_base(make, split, seed, steps)
        torch.manual_seed(100 + seed)
        model, optimizer = adapt(copy.deepcopy(bases[task, make, seed]), split, lr)
        train(model, optimizer, split.labeled, split, steps)
        row = found.setdefault(f"{task}, {labels} labels", {}).setdefault(method, {"parameters": count(model)})
        scores = row.setdefault("rates", {}).setdefault(f"{lr:g}", {"validation": {}, "test": {}})
        for part in ("validation", "test"):
            scores[part][str(seed)] = split.score(model, getattr(split, part))
        save()


def is_done(found: dict[str, dict], run: Run) -> bool:
    task, labels, method, lr, seed = run
    rates = found.get(f"{task}, {labels} labels", {}).get(method, {}).get("rates", {})
    return str(seed) in rates.get(f"{lr:g}", {}).get("test", {})


def chosen(row: dict) -> str:
    """The rate with the best mean over the seeds on the validation data."""
    return max(row["rates"], key=lambda lr: np.mean([*row["rates"][lr]["validation"].values()]))


def as_text(found: dict[str, dict]) -> str:
    """The tables in Markdown."""
    lines = []
    for part, rows in found.items():
        unit = "accuracy %" if "digits" in part else "explained variance %"
        lines += [f"### {part}", "", f"| | parameters | lr | {unit} | seeds | at lr {DEFAULT_RATE:g} |"]
        lines.append("|---|--:|--:|--:|---|--:|")
        for method, row in rows.items():
            values = {lr: [*scores["test"].values()] for lr, scores in row["rates"].items()}
            lr, default = chosen(row), values.get(f"{DEFAULT_RATE:g}") if "LoTRA" in method else None
            seeds = " ".join(f"{value:.1f}" for value in values[lr])
            cells = [method, f"{row['parameters']:,}", lr, f"{np.mean(values[lr]):.1f}", seeds]
            lines.append(f"| {' | '.join(cells)} | {'' if default is None else f'{np.mean(default):.1f}'} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="ten minutes on one core",
        writes="few_labels.json and .md; with --quick few_labels_quick.*",
        folder=command_line.RESULTS,
        quick="one seed, five steps, 20 labels: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    args = parser.parse_args()
    seeds, steps, labels = (1, 5, 20) if args.quick else (args.seeds, 300, None)

    path: Path = args.output / f"few_labels{'_quick' if args.quick else ''}.json"
    known = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    found = known.get("results", {})
    setting = {"steps": steps, "machine": known.get("setting", {}).get("machine", machine.describe())}

    def save() -> None:
        path.write_text(json.dumps({"setting": setting, "results": found}, indent=1) + "\n")

    run_all([run for run in runs(seeds, labels) if not is_done(found, run)], found, steps, save)
    text = as_text(found)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
