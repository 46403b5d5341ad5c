# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Convolutional KANs on shifted images: LoTRA beside PEFT's LoRA, at equal numbers of parameters.

Shown in docs/comparison.md.

    python examples/studies/convolutions.py  # scikit-learn's digits, some minutes on one core
    python examples/studies/convolutions.py --quick  # a few seconds, for CI: says nothing

A network of three convolutional KAN layers (radial basis functions, laid out as torch-conv-kan's FastKANConv2DLayer)
is trained on images, and adapted with a few hundred labels to the same kind of images rotated by 90 degrees and
inverted. The methods:

* LoTRA, a core and factors (out, in, basis) for each layer, with ranks by `LoTRAConfig(budget=)`;
* LoRA of PEFT on `base_conv` and `spline_conv`, which are ordinary `nn.Conv2d`;
* full fine-tuning, and the head alone.

The first two leave the head as it is, and have at most the parameters of a budget: shares of LoRA of rank 1 on all
convolutions. How each is set (learning rate; for LoRA which convolutions; for LoTRA the start) is chosen at each
budget, on seeds of its own, by the accuracy on images that count nowhere else. Writes convolutions.json and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import argparse
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from study_tools import files
from study_tools.tables import table
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    find_kan_layers,
    register_kan_layer,
    start_from_gradient,
)


torch.set_num_threads(1)  # additional threads slow down such small convolutions

CHANNELS = (1, 8, 16, 16)
BASIS = 5
LABELS = 300  # of the shifted images, for adaptation
SHARES = (0.2, 0.5, 1, 2)  # of the parameters of LoRA of rank 1 on all convolutions
RATES = (1e-2, 3e-2, 1e-1)

SETTINGS: dict[str, list[dict]] = {
    "LoTRA": [{"start": start, "lr": lr} for start, lr in itertools.product(("random", "gradient"), RATES)],
    "LoRA": [
        {"convolutions": names, "lr": lr}
        for names, lr in itertools.product(("base_conv|spline_conv", "spline_conv", "base_conv"), RATES)
    ],
    "full fine-tuning": [{"lr": lr} for lr in (3e-3, 1e-2, 3e-2)],
    "head alone": [{"lr": lr} for lr in RATES],
}
WITH_BUDGET = ("LoTRA", "LoRA")
POLICIES = {"random": "width", "gradient": {"core": 0.03, "factor_out": 0.5}}  # of the learning rates


class Gaussians(nn.Module):
    """exp(-((x - c) / h)^2) for centers c (K) at a distance of h."""

    def __init__(self, low: float, high: float, count: int) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(low, high, count), requires_grad=False)
        self.width = (high - low) / (count - 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(((x[..., None] - self.grid) / self.width) ** 2))


class ConvolutionalKANLayer(nn.Module):
    """A convolution of silu(x), plus one of radial basis functions of the normalized x."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        sizes = {"kernel_size": 3, "stride": stride, "padding": 1, "bias": False}
        self.base_conv = nn.ModuleList([nn.Conv2d(in_channels, out_channels, **sizes)])
        self.spline_conv = nn.ModuleList([nn.Conv2d(in_channels * BASIS, out_channels, **sizes)])
        self.layer_norm = nn.ModuleList([nn.InstanceNorm2d(in_channels)])
        self.base_activation = nn.SiLU()
        self.rbf = Gaussians(-2.0, 2.0, BASIS)
        self.inputdim, self.outdim, self.grid_size, self.groups = in_channels, out_channels, BASIS, 1

    def forward(self, x: Tensor) -> Tensor:
        functions = self.rbf(self.layer_norm[0](x)).movedim(-1, 2).flatten(1, 2)
        return self.base_conv[0](self.base_activation(x)) + self.spline_conv[0](functions)


register_kan_layer(
    "example-convolution",
    matches=ConvolutionalKANLayer,
    coefficients=("spline_conv.*.weight", "o (i k) ..."),
    residual=("base_conv.*.weight", "o i ..."),
    grid=("rbf.grid",),
)


class Network(nn.Module):
    """Images (N, 1, size, size) to the logits (N, 10)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        pairs = zip(itertools.pairwise(CHANNELS), (1, 2, 2), strict=True)
        self.layers = nn.Sequential(*(ConvolutionalKANLayer(*pair, stride) for pair, stride in pairs))
        self.head = nn.Linear(CHANNELS[-1] * math.ceil(size / 4) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


class Images(NamedTuple):
    x: Tensor  # (N, 1, size, size), in [0, 1]
    y: Tensor  # (N,)


class Task(NamedTuple):
    before: Images  # for the base
    after: Images  # rotated and inverted, for adaptation
    test: Images  # rotated and inverted, other images; validation ones in tuning
    base: nn.Module
    accuracy_before: float  # of the base on images that are not shifted


def load() -> Images:
    """scikit-learn's digits."""
    digits = load_digits()
    return Images(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target))


def shift(x: Tensor) -> Tensor:
    return 1 - x.rot90(1, (-2, -1))


def make_task(images: Images, seed: int, validate: bool, steps: int) -> Task:
    """A split of the images, a fifth of which is for validation and a fifth for the test, and a trained base."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.y), generator=generator)
    fifth = min(len(order) // 5, 1000)
    train, parts = order[2 * fifth :], (order[:fifth], order[fifth : 2 * fifth])
    held_out = parts[0 if validate else 1]
    before = Images(images.x[train], images.y[train])
    after = Images(shift(before.x[:LABELS]), before.y[:LABELS])
    test = Images(shift(images.x[held_out]), images.y[held_out])
    torch.manual_seed(seed)
    base = Network(images.x.shape[-1])
    train_on(base, torch.optim.Adam(base.parameters(), lr=3e-3), before, 2 * steps, seed)
    return Task(before, after, test, base, accuracy(base, Images(images.x[held_out], images.y[held_out])))


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images.y), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """In percent."""
    model.eval()
    return 100 * (model(images.x).argmax(1) == images.y).float().mean().item()


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def lora_cost(base: nn.Module, names: str = "base_conv|spline_conv") -> int:
    """The number of parameters of LoRA for each rank."""
    weights = [conv.weight for name, conv in convolutions(base) if name.split(".")[-2] in names.split("|")]
    return sum(weight[0].numel() + len(weight) for weight in weights)


class Job(NamedTuple):
    method: str
    setting: dict
    budget: int  # of parameters; 0 for the methods without
    task: Task
    seed: int
    steps: int


class Outcome(NamedTuple):
    accuracy: float
    parameters: int
    ranks: str


def adapt(job: Job) -> Outcome:
    """One adaptation and its test."""
    method, setting, budget, task, seed, steps = job
    torch.manual_seed(seed)
    base, ranks, policy = copy.deepcopy(task.base), "", {}
    model: nn.Module = base
    if method == "LoTRA":
        coefficients = sum(parameter.numel() for parameter in base.layers.parameters() if parameter.requires_grad)
        model = get_peft_model(base, LoTRAConfig(budget=budget / coefficients))
        ranks = " ".join(str(row.adapters["default"]).replace(" ", "") for row in find_kan_layers(model))
        if setting["start"] == "gradient":
            start_from_gradient(model, lambda: F.cross_entropy(model(task.after.x), task.after.y))
        policy = POLICIES[setting["start"]]
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=setting["lr"], policy=policy)
    else:
        if method == "LoRA":
            names = setting["convolutions"]
            rank = budget // lora_cost(base, names)
            ranks = f"{rank} on {names.replace('|', ' and ')}"
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf".*({names})\.\d+")
            model = get_peft_model(base, config)
        elif method == "head alone":
            base.layers.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=setting["lr"])
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    train_on(model, optimizer, task.after, steps, seed)
    return Outcome(accuracy(model, task.test), count, ranks)


def budgets_of(base: nn.Module) -> list[int]:
    return [round(share * lora_cost(base)) for share in SHARES]


def cases(base: nn.Module) -> list[tuple[str, int]]:
    """Each method with each budget, or with 0."""
    return [(method, budget) for method in SETTINGS for budget in (budgets_of(base) if method in WITH_BUDGET else [0])]


def compare(images: Images, args: argparse.Namespace, run: Callable[[list[Job]], list[Outcome]]) -> dict:
    """Choose the settings on tasks of their own, then adapt with them."""
    tuning = [make_task(images, 1000 + seed, True, args.steps) for seed in range(args.tuning_seeds)]
    tasks = [make_task(images, seed, False, args.steps) for seed in range(args.seeds)]
    base = tasks[0].base
    options = [
        (case, setting)
        for case in cases(base)
        for setting in SETTINGS[case[0]][: 2 if args.quick else None]
        if case[0] != "LoRA" or lora_cost(base, setting["convolutions"]) <= case[1]
    ]
    if args.quick:  # LoRA fits into the smallest budget on these convolutions alone
        options += [(case, SETTINGS["LoRA"][-1]) for case in cases(base) if case[0] == "LoRA"]
    seeded = list(enumerate(tuning, 1000))
    jobs = [Job(m, setting, b, task, seed, args.steps) for (m, b), setting in options for seed, task in seeded]
    found = [outcome.accuracy for outcome in run(jobs)]
    means = np.reshape(found, (len(options), -1)).mean(1)
    tried = [
        {"method": method, "budget": budget, "setting": setting, "accuracy": float(mean)}
        for ((method, budget), setting), mean in zip(options, means, strict=True)
    ]
    rows = []
    for method, budget in cases(base):
        here = [entry for entry in tried if (entry["method"], entry["budget"]) == (method, budget)]
        setting = max(here, key=lambda entry: entry["accuracy"])["setting"]
        outcomes = run([Job(method, setting, budget, task, seed, args.steps) for seed, task in enumerate(tasks)])
        row = {"method": method, "budget": budget, **outcomes[0]._asdict(), "setting": setting}
        rows.append({**row, "accuracy": [outcome.accuracy for outcome in outcomes]})
    bases = {"base": [accuracy(task.base, task.test) for task in tasks], "before": [t.accuracy_before for t in tasks]}
    return {"budgets": budgets_of(base), **bases, "rows": rows, "tried": tried}


def as_text(results: dict) -> str:
    """The table in Markdown."""

    def cells(values: list[float]) -> str:
        return f"{np.mean(values):.1f} | {' '.join(f'{value:.1f}' for value in values)}"

    lines = [["", "base, not adapted", 0, "", "", cells(results["base"])]]
    for row in sorted(results["rows"], key=lambda row: row["budget"]):
        setting = ", ".join(
            f"{name} {value:g}" if name == "lr" else f"{value}" for name, value in row["setting"].items()
        )
        budget = f"{row['budget']:,}" if row["budget"] else ""
        line = [budget, row["method"], f"{row['parameters']:,}", row["ranks"], setting.replace("|", " and ")]
        lines.append([*line, cells(row["accuracy"])])
    text = table("| budget | method | parameters | ranks | setting | accuracy % | seeds |", lines, left=2)
    title = f"{results['data']}: rotated by 90 degrees and inverted, {LABELS} labels"
    note = (
        f"The base has {np.mean(results['before']):.1f} % on images as they were. Ranks of LoTRA are those of seed 0."
    )
    return f"### {title}\n\n{note}\n\n{text}"


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__,
        takes="some minutes on one core",
        writes="convolutions.json and .md",
        folder=command_line.RESULTS,
        quick="one seed, few steps and settings: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="how many runs choose the settings (default: 2)")
    parser.add_argument("--steps", type=int, default=150, help="steps of each adaptation (default: 150)")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.tuning_seeds, args.steps = 1, 1, 3

    path = files.path_of(args, "convolutions")
    with tqdm(unit="run", ncols=100) as bar:

        def run(jobs: list[Job]) -> list[Outcome]:
            outcomes = []
            for job in jobs:
                outcomes.append(adapt(job))
                bar.update()
            return outcomes

        results = compare(load(), args, run)
    setting = {"labels": LABELS, "steps": args.steps, "channels": CHANNELS, "basis": BASIS}
    results = {"data": "digits", "setting": setting, **results}
    files.write(path, results)
    files.write_page(path, as_text(results))


if __name__ == "__main__":
    main()
