# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Real shifts of data that a trained KAN is adapted to, and the KANs of several libraries."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import rotate
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from tqdm import tqdm

from peft_lotra.kan import KAN


Data = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Task:
    """Data before and after a change, each (inputs, targets), and the score of a model on the changed data."""

    name: str
    widths: list[int]
    before: Data
    after: Data
    test: Data
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rotated_digits(seed: int, angle: float = 45, noise: float = 2, hidden: int = 32) -> Task:
    """Rotated and noisy scans, 200 of them with labels; at 30 degrees the shift of the quickstart."""
    images, labels = load_digits(return_X_y=True)
    images, y = images.reshape(-1, 8, 8), torch.tensor(labels)
    noises = noise * np.random.default_rng(seed).normal(0, 1, images.shape)
    plain, rotated = (
        torch.tensor(scans.clip(0, 16) / 8 - 1, dtype=torch.float32).flatten(1)
        for scans in (images, rotate(images, angle, axes=(1, 2), reshape=False, order=1) + noises)
    )
    order = torch.tensor(np.random.default_rng(seed).permutation(len(y)))
    test, seen, few = order[:597], order[597:], order[597:797]
    return Task(
        "digits, rotated",
        [64, hidden, 10],
        (plain[seen], y[seen]),
        (rotated[few], y[few]),
        (rotated[test], y[test]),
        F.cross_entropy,
    )


def load_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images (N, 28, 28) and labels (N,) of bytes from the two files of IDX in a folder."""

    def read(pattern: str, header: int) -> np.ndarray:
        (path,) = folder.glob(pattern)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return np.frombuffer(content, np.uint8, offset=header)

    return read("*images-idx3-ubyte*", 16).reshape(-1, 28, 28), read("*labels-idx1-ubyte*", 8)


def digits_to_mnist(seed: int, folder: Path, labels: int = 500) -> Task:
    """Scikit-learn's digits, then MNIST brought to 8x8 (its 20x20 box averaged)."""
    pixels, numbers = load_mnist(folder)
    images = torch.tensor(pixels[:, None].astype(np.float32))
    y = torch.tensor(numbers.astype(np.int64))
    x = F.adaptive_avg_pool2d(images[:, :, 4:24, 4:24], 8).flatten(1) / 127.5 - 1
    few = torch.tensor(np.random.default_rng(seed).permutation(8000)[:labels])
    digits, labels = load_digits(return_X_y=True)
    before = torch.tensor(digits / 8 - 1, dtype=torch.float32), torch.tensor(labels)
    return Task("digits to MNIST", [64, 48, 10], before, (x[few], y[few]), (x[8000:], y[8000:]), F.cross_entropy)


def function_family(seed: int) -> Task:
    """f(x; a) = exp(sin(a pi x1) + x2^2) / 2 - 1 with a = 1, then with a = 1.3."""
    x = torch.rand(3000, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    before, after = (((a * torch.pi * x[:, :1]).sin() + x[:, 1:] ** 2).exp() / 2 - 1 for a in (1.0, 1.3))
    parts = (slice(0, 2000), slice(2000, 3000))
    return Task(
        "function family",
        [2, 32, 32, 1],
        (x[parts[0]], before[parts[0]]),
        (x[parts[0]], after[parts[0]]),
        (x[parts[1]], after[parts[1]]),
        F.mse_loss,
    )


def diabetes(seed: int) -> Task:
    """The progression of diabetes for the younger half of the patients, then for 150 of the older half."""
    x, y = load_diabetes(return_X_y=True)
    x = torch.tensor((x / x.std(0) / 3).clip(-1, 1), dtype=torch.float32)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
    old = x[:, 0] > x[:, 0].median()
    order = torch.tensor(np.random.default_rng(seed).permutation(int(old.sum())))
    (x_old, y_old), few, test = (x[old], y[old]), order[:150], order[150:]
    return Task(
        "diabetes, older patients",
        [10, 32, 1],
        (x[~old], y[~old]),
        (x_old[few], y_old[few]),
        (x_old[test], y_old[test]),
        F.mse_loss,
    )


def train(model: nn.Module, task: Task, data: Data, steps: int, lr: float, bar: tqdm) -> nn.Module:
    """Train the trainable parameters by AdamW on batches of 128."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (128,))
        optimizer.zero_grad()
        task.loss(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
        scheduler.step()
        bar.update()
    return model


@torch.no_grad()
def score(model: nn.Module, task: Task) -> float:
    """Accuracy in % on the changed data, or the mean squared error."""
    output = model(task.test[0])
    if task.loss is F.cross_entropy:
        return 100 * (output.argmax(1) == task.test[1]).float().mean().item()
    return task.loss(output, task.test[1]).item()


def build(library: str, widths: list[int]) -> nn.Module:
    """A KAN of `peft_lotra`, of efficient-kan (qkan's copy of it; without the edges' trainable scales, and with them),
    or of pykan."""
    if library == "peft-lotra":
        return KAN(widths)
    if library.startswith("efficient-kan"):
        from qkan.kan import KANLinear

        scales = library.endswith("scales")
        return nn.Sequential(
            *(KANLinear(i, o, enable_standalone_scale_spline=scales) for i, o in zip(widths, widths[1:], strict=False))
        )
    from kan import KAN as PyKAN

    return PyKAN(widths, grid=5, k=3, auto_save=False, device="cpu").speed()
