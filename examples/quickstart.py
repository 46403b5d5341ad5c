# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A KAN that reads digits learns the scans of a new scanner.

    python examples/quickstart.py

A base is trained on scikit-learn's digits. Then scans come rotated and noisy,
200 of them with labels. LoTRA and full fine-tuning adapt the base. The adapter
is saved, loaded into a fresh base, and merged.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from quickstart_pictures import animate, record_into
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


torch.set_num_threads(1)  # more threads slow down such small matrices

NAMES = "base, not adapted", "LoTRA", "full fine-tuning"
LABELS, TEST = 200, 597  # new scans with labels, and those of the test
IMAGES, DIGITS = load_digits(return_X_y=True)
IMAGES, DIGITS = IMAGES.reshape(-1, 8, 8), torch.tensor(DIGITS)


def scan(seed=None):
    """Return all digits (N, 64), -1 to 1; with a seed, by the new scanner."""
    images = IMAGES
    if seed is not None:
        images = rotate(images, 30, axes=(1, 2), reshape=False, order=1)
        images = images + np.random.default_rng(seed).normal(0, 2, images.shape)
    return torch.tensor(images.clip(0, 16) / 8 - 1).float().flatten(1)


def train(model, optimizer, x, y, steps, name, record=None):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), name, ncols=80, mininterval=1):
        if record:
            record(model, step)
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()


def percent_right(model, x, rows):
    return (
        100 * (model(x[rows]).argmax(1) == DIGITS[rows]).float().mean().item()
    )


def compare(seed, steps, record=None):
    """Train a base, adapt it in two ways; return models, test rows, results."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(DIGITS))
    test, seen = order[:TEST], order[TEST:]
    old, new = scan(), scan(seed)

    base = KAN([64, 32, 10])
    adam = torch.optim.Adam(base.parameters(), lr=5e-3)
    train(base, adam, old[seen], DIGITS[seen], 2 * steps, "base")

    x, y = new[seen[:LABELS]], DIGITS[seen[:LABELS]]
    lotra = get_peft_model(copy.deepcopy(base), LoTRAConfig())
    start_from_gradient(lotra, lambda: cross_entropy(lotra(x), y))
    optimizer = create_lotra_optimizer(lotra, torch.optim.Adam, lr=3e-2)
    train(lotra, optimizer, x, y, steps, "LoTRA", record)

    full = copy.deepcopy(base)
    adam = torch.optim.Adam(full.parameters(), lr=1e-2)
    train(full, adam, x, y, steps, "full fine-tuning")

    base.requires_grad_(False)
    results = {}
    for name, model in zip(NAMES, (base, lotra, full), strict=True):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        results[name] = [percent_right(model, new, test), trained]
    return base, lotra, test, results


def save_load_merge(base, lotra, x, folder):
    """Write the adapter, load it into a fresh base, and merge it."""
    lotra.save_pretrained(folder)  # or `push_to_hub(lotra, "user/name")`
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"adapter file: {size / 1000:.1f} kB, in {folder}")
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    print(f"loaded: difference {(model(x) - lotra(x)).abs().max():.0e}")
    merged = model.merge_and_unload()
    change = (merged(x) - lotra(x)).abs().max()
    print(f"merged, a {type(merged).__name__} again: difference {change:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    folder = Path(__file__).parent / "output"
    parser.add_argument("--output", type=Path, default=folder)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    states = []
    runs = [compare(0, args.steps, record_into(states))]
    runs += [compare(seed, args.steps) for seed in range(1, args.seeds)]
    rows = {name: [results[name] for *_, results in runs] for name in NAMES}
    print(f"\naccuracy on the new scans, {LABELS} labels")
    for name in NAMES:
        percent, trained = np.mean(rows[name], axis=0)
        print(f"{name:18} {percent:5.1f} %  {trained:6,.0f} parameters")
    record = json.dumps({"steps": args.steps, "rows": rows})
    (args.output / "quickstart.json").write_text(record + "\n")

    base, lotra, test, _ = runs[0]
    save_load_merge(base, lotra, scan(0)[test], args.output / "adapter")
    new = scan(0)
    five = [test[int((DIGITS[test] == d).nonzero()[0])] for d in range(5)]
    measure = partial(percent_right, lotra, new, test)
    animate(lotra, states, new[five], new[test], measure, args.output)
    print(f"training.gif and training_dark.gif in {args.output}")


if __name__ == "__main__":
    main()
