# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""(b) Forward and backward of a KAN layer n -> n, for several libraries and for nn.Linear(8n, n)."""

from __future__ import annotations

import torch

from figures.measure import interleave
from figures.subjects import GRID, LAYERS, forward_backward, make_layer, too_large


def cells(quick: bool) -> list[dict]:
    """Width, batch and grid of each cell."""
    sizes = [(16, 64), (16, 1024), (64, 1024), (256, 256), (256, 4096), (1024, 1024)]
    cells = [{"width": width, "batch": batch, "grid": GRID} for width, batch in sizes]
    if quick:
        return cells[:1]
    return cells[1:] + [{"width": 256, "batch": 4096, "grid": grid} for grid in (8, 64)]


def measure(cell: dict, device: torch.device, quick: bool) -> dict:
    """Times the layers at the width, batch and grid of the cell."""
    width, batch, grid = cell["width"], cell["batch"], cell["grid"]
    reasons = {name: too_large(name, batch, [width, width], grid) for name in LAYERS}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if device.type == "cuda":
        skipped["pykan"] = "is built on the CPU only"
    subjects = {
        name: forward_backward(*make_layer(name, width, batch, grid, device)) for name in LAYERS if name not in skipped
    }
    result = interleave(subjects, device, 0.1 if quick else 4.0)
    return result | {"skipped": skipped | result.get("skipped", {})}
