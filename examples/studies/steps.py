# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How long to train an adapter: accuracy and loss on the task of quickstart.py after 30 to 3,000 steps.

Shown in docs/training.md.

    python examples/studies/steps.py  # two minutes on one core
    python examples/studies/steps.py --quick  # a few seconds, for CI: says nothing

An adapter with the default ranks starts from the gradient. The learning rate falls along a cosine over the steps. The
labels are those of 200 or of 50 scans of the new scanner.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from peft import get_peft_model
from study_tools import files
from study_tools.tables import table
from torch import nn
from torch.nn import functional as F

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


sys.path.append(str(Path(__file__).parents[1]))

from quickstart import DIGITS, TEST, scan, train  # noqa: E402


STEPS = (30, 100, 300, 1000, 3000)
LABELS = (200, 50)


def train_base(seed: int, steps: int) -> tuple[nn.Module, np.ndarray]:
    """Return a network that reads the old scans, and the order of the scans: those of the test are first."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(DIGITS))
    base = KAN([64, 32, 10])
    optimizer = torch.optim.Adam(base.parameters(), lr=5e-3)
    seen = order[TEST:]
    train(base, optimizer, scan()[seen], DIGITS[seen], steps, "base")
    return base, order


def measure(base: nn.Module, order: np.ndarray, seed: int, labels: int, steps: int) -> dict[str, float]:
    """Adapt the base, and return the accuracy in % and the loss on the test scans."""
    torch.manual_seed(seed)
    scans = scan(seed)
    labeled = order[TEST : TEST + labels]
    x, y = scans[labeled], DIGITS[labeled]

    model = get_peft_model(copy.deepcopy(base), LoTRAConfig())
    start_from_gradient(model, lambda: F.cross_entropy(model(x), y))
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
    train(model, optimizer, x, y, steps, f"{labels} labels, {steps} steps")

    test = order[:TEST]
    with torch.no_grad():
        logits = model(scans[test])
    is_right = logits.argmax(1) == DIGITS[test]
    return {
        "accuracy": 100 * is_right.float().mean().item(),
        "loss": F.cross_entropy(logits, DIGITS[test]).item(),
    }


def markdown(results: dict[str, dict[str, list[dict]]]) -> str:
    """The table of docs/training.md."""
    header = " | ".join(f"{int(steps):,}" for steps in next(iter(results.values())))
    lines = []
    for labels, by_steps in results.items():
        for key, title, digits in (("accuracy", "accuracy %", 1), ("loss", "test loss", 2)):
            means = [mean(run[key] for run in runs) for runs in by_steps.values()]
            lines.append([f"{labels} labels, {title}", *(f"{value:.{digits}f}" for value in means)])
    return table(f"| steps | {header} |", lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="2 minutes on one core",
        writes="steps.json, steps.md",
        folder=command_line.RESULTS,
        quick="a few steps: to see it run",
    )
    parser.add_seeds(0, 1, 2)
    args = parser.parse_args()
    all_steps = (2, 3) if args.quick else STEPS
    bases = {seed: train_base(seed, 5 if args.quick else 600) for seed in args.seeds}

    results: dict[str, dict[str, list[dict]]] = {}
    for labels in LABELS:
        by_steps = results.setdefault(str(labels), {})
        for steps in all_steps:
            by_steps[str(steps)] = [measure(*bases[seed], seed, labels, steps) for seed in args.seeds]
    path = files.path_of(args, "steps")
    files.write(path, {"results": results})
    files.write_page(path, markdown(results))


if __name__ == "__main__":
    main()
