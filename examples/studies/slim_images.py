# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Images by Slim KANs: a dense KAN beside Slim KANs, and peers of as few parameters.

Shown in docs/slim.md.

    python examples/studies/slim_images.py  # scikit-learn's digits, no network, three minutes
    python examples/studies/slim_images.py --quick  # one seed, a few epochs, for CI
    python examples/studies/slim_images.py --data-dir PATH/TO/mnist  # 10,000 images of MNIST, a folder of IDX files

Networks are [pixels, 64, 10] and train for the same epochs on the same batches. The first 8,000 images of MNIST are
for training, the others for the test.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from study_tools import files
from study_tools.tables import table
from study_tools.tasks import load_mnist
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import create_lotra_optimizer
from peft_lotra.kan import KAN, SlimKAN


torch.set_num_threads(1)  # for comparable seconds; additional threads slow down such small matrices

HIDDEN = 64
# By Adam with a cosine schedule. The best of 1e-3, 3e-3 and 1e-2, for fine-tuning of 3e-4, 1e-3 and 3e-3, on the
# digits; within half a point of the best on the last 1,000 training images of MNIST-10k.
LEARNING_RATES = {"dense": 3e-3, "slim": 1e-2}


@dataclass
class Images:
    """Pixels (N, P), -1 to 1, and labels (N,), for training and for the test."""

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits(seed: int) -> Images:
    """scikit-learn's 1,797 digits, a quarter of them held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 8 - 1, y, test_size=0.25, random_state=seed, stratify=y)
    tensors = (torch.tensor(x).float(), torch.tensor(y), torch.tensor(x_test).float(), torch.tensor(y_test))
    return Images("digits", *tensors)


def load_images(folder: Path) -> Images:
    """MNIST's 10,000 test images, a fifth of them held out."""
    pixels, labels = load_mnist(folder)
    x = torch.tensor(pixels.reshape(len(pixels), -1) / 127.5 - 1, dtype=torch.float32)
    y = torch.tensor(labels).long()
    end = len(x) * 4 // 5
    return Images(folder.name, x[:end], y[:end], x[end:], y[end:])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def mlp(pixels: int, classes: int, parameters: int) -> nn.Module:
    """An MLP of one hidden layer with about the given number of parameters."""
    hidden = max(1, round((parameters - classes) / (pixels + classes + 1)))
    return nn.Sequential(nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, classes))


def narrow_kan(pixels: int, classes: int, parameters: int) -> nn.Module:
    """A dense KAN of one hidden layer with about the given number of parameters."""
    return KAN([pixels, max(1, round(parameters / (9 * (pixels + classes)))), classes])


def train(model: nn.Module, data: Images, epochs: int, batch: int, lr: float) -> float:
    """Train by Adam, Slim layers with a rate per component, and return the seconds."""
    start = time.perf_counter()
    if any(hasattr(module, "factor_basis") for module in model.modules()):
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=lr)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(data.x) / batch))
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x)).split(batch):
            loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    return 100 * (model(data.x_test).argmax(1) == data.y_test).double().mean().item()


def compare(
    data: Images, seed: int, ranks: list[tuple[int, int, int]], epochs: int, batch: int, bar: tqdm
) -> list[dict]:
    """Train every model on the data; return a row for each."""
    pixels, classes = data.x.shape[1], int(data.y.max()) + 1
    widths = [pixels, HIDDEN, classes]
    rows = []

    def fit(name: str, make: Callable[[], nn.Module], lr: float) -> nn.Module:
        bar.set_description(name)
        torch.manual_seed(seed)
        model = make()
        seconds = train(model, data, epochs, batch, lr)
        row = {"data": data.name, "model": name, "seed": seed, "parameters": count(model)}
        rows.append(row | {"accuracy": accuracy(model, data), "seconds": round(seconds, 2)})
        bar.update()
        return model

    fit("dense KAN", lambda: KAN(widths), LEARNING_RATES["dense"])
    sizes = []
    for triple in ranks:
        model = fit(
            f"Slim KAN {triple}",
            lambda triple=triple: SlimKAN(widths, [triple, (classes, *triple[1:])]),
            LEARNING_RATES["slim"],
        )
        sizes.append(count(model))
    fit("narrow KAN", lambda: narrow_kan(pixels, classes, sizes[0]), LEARNING_RATES["dense"])
    fit("MLP", lambda: mlp(pixels, classes, sizes[0]), LEARNING_RATES["dense"])
    fit("logistic regression", lambda: nn.Linear(pixels, classes), LEARNING_RATES["dense"])
    return rows


def as_text(rows: list[dict]) -> str:
    lines = []
    dense = next(row["parameters"] for row in rows if row["model"] == "dense KAN")
    for model in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == model]
        accuracies = [row["accuracy"] for row in runs]
        spread = f"{stdev(accuracies):.2f}" if len(runs) > 1 else "-"
        parameters = round(mean(row["parameters"] for row in runs))
        seconds = mean(row["seconds"] for row in runs)
        cells = [model, f"{parameters:,}", f"{dense / parameters:.1f}x", f"{mean(accuracies):.2f}", spread]
        lines.append([*cells, f"{seconds:.1f}"])
    return table(f"| {rows[0]['data']} | parameters | fewer | accuracy % | +- | seconds |", lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="three minutes on one core (MNIST: several times as long)",
        writes="slim_images_DATA.json; seeds in the file are not run again",
        folder=command_line.RESULTS,
        quick="one seed and two epochs: to see it run",
    )
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, instead of the digits")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each model (default: %(default)s)")
    args = parser.parse_args()
    if args.data_dir is None:
        data, epochs, batch, ranks = None, 30, 64, [(20, 20, 2), (10, 10, 2)]
    else:
        data, epochs, batch, ranks = load_images(args.data_dir), 6, 256, [(24, 24, 4), (16, 16, 4)]
    seeds = args.seeds
    if args.quick:
        epochs, seeds = 2, 1
    path = files.path_of(args, f"slim_images_{'digits' if data is None else data.name}")
    setting = {"epochs": epochs, "batch": batch, "learning_rates": LEARNING_RATES, "hidden": HIDDEN}

    known = files.read(path)  # whose seeds are not repeated
    rows = known["rows"] if known.get("setting") == setting else []
    todo = [seed for seed in range(seeds) if seed not in {row["seed"] for row in rows}]
    with tqdm(total=6 * len(todo), unit="model") as bar:
        for seed in todo:
            rows += compare(data if data is not None else load_digits(seed), seed, ranks, epochs, batch, bar)
            files.write(path, {"setting": setting, "rows": rows})
    print(as_text(rows))


if __name__ == "__main__":
    main()
