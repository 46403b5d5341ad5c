# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A vision transformer whose MLPs are KANs, adapted to another kind of scans.

    python examples/studies/kan_vit.py  # a minute or two on two cores, no network

A small ViT of transformers reads scikit-learn's handwritten digits in 16 patches. The MLP of each of its blocks is a
KAN, so its layers get inputs (images, patches, features). Then the scans are rotated by 30 degrees, with 384 labels.
LoTRA adapts the KAN layers of the second block (`exclude_modules` leaves the first one alone) and trains the head
(`modules_to_save`). The comparisons are the head alone, and full fine-tuning.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
from pathlib import Path

import matplotlib
import numpy as np
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from study_tools import files
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from peft_lotra import LoTRAConfig, create_lotra_optimizer, model_summary
from peft_lotra.kan import KAN


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)

HIDDEN, INNER = 32, 16
LABELS, TEST = 384, 597
# The second block's KAN and the head. The names are those of transformers 5 (mlp) and 4 (intermediate).
LOTRA = LoTRAConfig(r=(8, 8, 4), exclude_modules=r".*\.0\.(mlp|intermediate)\..*", modules_to_save=["classifier"])
LEARNING_RATES = {"LoTRA and head": 5e-3, "head alone": 5e-3, "full fine-tuning": 1e-3}


class _AddInput(nn.Module):
    """The residual connection, which in transformers 4 belongs to the MLP."""

    def forward(self, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return hidden + inputs


def make_vit() -> ViTForImageClassification:
    """A ViT of two blocks for images (1, 8, 8), with KANs of normalized inputs instead of MLPs."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=INNER,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    for block in [module for module in model.modules() if type(module).__name__ == "ViTLayer"]:
        kan = KAN([HIDDEN, INNER, HIDDEN], grid_range=(-3, 3))
        if hasattr(block, "mlp"):
            block.mlp = kan
        else:
            block.intermediate, block.output = kan, _AddInput()
    return model


def load_scans() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain and the rotated digits, (images, 1, 8, 8) from -1 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = images.reshape(-1, 8, 8)[order]
    scans = (images, rotate(images, 30, axes=(1, 2), reshape=False, order=1))
    plain, rotated = (torch.tensor(scan / 8 - 1, dtype=torch.float32).unsqueeze(1) for scan in scans)
    return plain, rotated, torch.tensor(labels[order])


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float, name: str) -> None:
    """Trains the trainable parameters by AdamW on batches of 128."""
    if isinstance(model, PeftModel):
        optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    else:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in tqdm(range(steps), unit="step", ncols=100, desc=name):
        rows = torch.randint(len(x), (128,))
        loss = model(pixel_values=x[rows], labels=y[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * (model(pixel_values=x).logits.argmax(-1) == y).float().mean().item()


def draw(results: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    names = list(results)
    bars = axis.barh(
        names, [results[name]["rotated"] for name in names], color=["0.7", "tab:green", "0.5", "tab:blue"]
    )
    labels = [f"{row['rotated']:.1f} %, {row['trainable']:,} trained" for row in results.values()]
    axis.bar_label(bars, labels, padding=4)
    axis.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="accuracy on rotated digits, %")
    axis.set_title(f"A ViT with KANs as its MLPs, {LABELS} labels of rotated digits")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__, takes="a minute or two on two cores", writes="kan_vit.json and .png", folder=command_line.OUTPUT
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of each training (default: 150)")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    plain, rotated, y = load_scans()
    test, few = slice(0, TEST), slice(TEST, TEST + LABELS)
    base = make_vit()
    train(base, plain[TEST:], y[TEST:], 2 * args.steps, 2e-3, "base")
    results = {"base, not adapted": {"rotated": accuracy(base, rotated[test], y[test]), "trainable": 0}}
    for name, lr in LEARNING_RATES.items():
        model = copy.deepcopy(base)
        if name == "LoTRA and head":
            model = lotra = get_peft_model(model, LOTRA)
        elif name == "head alone":
            model.requires_grad_(False)
            model.classifier.requires_grad_(True)
        train(model, rotated[few], y[few], args.steps, lr, name)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        results[name] = {"rotated": accuracy(model, rotated[test], y[test]), "trainable": trainable}

    lotra.save_pretrained(args.output / "kan_vit")
    with torch.no_grad():
        expected = lotra(pixel_values=rotated[test]).logits
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), args.output / "kan_vit").eval()
        reloaded = (loaded(pixel_values=rotated[test]).logits - expected).abs().max().item()
        merged = (loaded.merge_and_unload()(pixel_values=rotated[test]).logits - expected).abs().max().item()

    console = Console(width=110)
    console.print(model_summary(lotra))
    table = Table(title=f"Rotated digits, {LABELS} labels")
    for column in ("", "accuracy %", "trained parameters"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results.items():
        table.add_row(name, f"{row['rotated']:.1f}", f"{row['trainable']:,}" if row["trainable"] else "-")
    console.print(table)
    console.print(f"reloaded: largest difference {reloaded:.1e}; merged: {merged:.1e}")
    files.write(args.output / "kan_vit.json", results)
    draw(results, args.output / "kan_vit.png")
    console.print(f"picture: {args.output / 'kan_vit.png'}")


if __name__ == "__main__":
    main()
