# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family over a domain parameter: digits that are rotated by an angle, classified by a KAN trained upright.

    python examples/studies/parametric/digits.py            # about two minutes of one core
    python examples/studies/parametric/digits.py --quick

Ten members are trained by Adam; at the angles between them the predicted adapter is compared with the nearest member,
with the base, and with an adapter trained at the angle itself.
"""

from __future__ import annotations

from equations import command_line  # isort: split


import statistics
from functools import cache, partial

import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from study_tools import files
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN


torch.set_num_threads(1)

TEST = 600  # the last images are for tests


@cache
def images(angle: float) -> tuple[Tensor, Tensor]:
    """All images (n, 64), rotated by an angle in degrees, with their labels."""
    data = load_digits()
    turned = rotate(data.images, angle, axes=(1, 2), reshape=False, order=1)
    x = torch.from_numpy(turned).float().flatten(1) / 8 - 1
    return x, torch.from_numpy(data.target)


def train(model: nn.Module, angle: float, steps: int, lr: float) -> None:
    x, y = (part[:-TEST] for part in images(angle))
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()


def loss_of(model: nn.Module, angle: float) -> Tensor:
    x, y = (part[:-TEST] for part in images(angle))
    return cross_entropy(model(x), y)


def accuracy(evaluate, angle: float) -> float:
    x, y = (part[-TEST:] for part in images(angle))
    with torch.no_grad():
        return (evaluate(x).argmax(1) == y).double().mean().item()


def run(seed: int, steps: int, angles: list[float]) -> list[dict]:
    torch.manual_seed(seed)
    base = KAN([64, 16, 10])
    train(base, 0.0, 3 * steps, 0.02)
    family = ParametricAdapter(base, ranks=(10, 16, 8), loss_of=loss_of)
    member = partial(train, steps=steps, lr=0.01)
    family.fit(angles, train=member, progress=False)
    rows = []
    for low, high in zip(angles, angles[1:], strict=False):
        angle = low + 0.4 * (high - low)
        alone = ParametricAdapter(base, ranks=(10, 16, 8), loss_of=loss_of)
        alone.fit([angle], train=member, progress=False)
        found = {
            "base": base,
            "nearest": family.predict(low),
            "predicted": family.predict(angle),
            "trained": alone.predict(angle),
        }
        rows.append({"angle": angle, **{name: accuracy(model, angle) for name, model in found.items()}})
    return rows


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about two minutes of one core",
        writes="digits.json",
        folder=command_line.RESULTS / "parametric",
        quick="a tiny setting, to see that it runs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    angles = [0.0, 10.0, 20.0] if args.quick else [10.0 * step for step in range(10)]
    rows = [
        {"seed": seed, **row}
        for seed in (args.seeds[:1] if args.quick else args.seeds)
        for row in run(seed, 5 if args.quick else 60, angles)
    ]
    means = {name: statistics.mean(row[name] for row in rows) for name in ("base", "nearest", "predicted", "trained")}
    name = "quick_digits.json" if args.quick else "digits.json"
    files.write(args.output / name, {"means": means, "rows": rows})
    print({name: f"{100 * value:.1f} %" for name, value in means.items()})


if __name__ == "__main__":
    main()
