# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""(a) A training step by LoTRA, full fine-tuning and PEFT's LoRA, beside a frozen base, on two kinds of KAN."""

from __future__ import annotations

import torch

from figures.measure import LIMIT_SECONDS, Parts, interleave, time_parts
from figures.subjects import (
    KANS,
    METHODS,
    count_trainable,
    laplacian_residual,
    make_kan,
    random_inputs,
    squared_error,
    too_large,
    training_step,
)


SQUARES, LAPLACIAN = "squared error", "Laplacian residual"


def cells(quick: bool) -> list[dict]:
    """KAN, widths, batch and loss of each cell."""
    widths, batches = ((16,), (64,)) if quick else ((16, 64, 256, 1024), (256, 1024, 4096))
    result = [
        {"kan": kan, "widths": [width, width], "batch": batch, "loss": SQUARES}
        for kan in KANS
        for width in widths
        for batch in batches
    ]
    pinn = {"widths": [2, 16, 16, 1], "batch": 100 if quick else 2000, "loss": LAPLACIAN}
    return result + [{"kan": kan, **pinn} for kan in KANS]


def measure(cell: dict, device: torch.device, quick: bool) -> dict:
    reason = why_not_measured(cell, device)
    if reason:
        return {"ms": {}, "rounds": 0, "skipped": dict.fromkeys(METHODS, reason)}
    subjects, trainable = make_subjects(cell, cell["batch"], device)
    return {"trainable": trainable, **interleave(subjects, device, 0.1 if quick else 3.0)}


def why_not_measured(cell: dict, device: torch.device) -> str | None:
    """Why a cell is left out, or None."""
    return too_large(KANS[cell["kan"]], cell["batch"], cell["widths"]) or too_slow(cell, device)


def make_subjects(cell: dict, batch: int, device: torch.device) -> tuple[dict[str, Parts], dict[str, int]]:
    """Each method's training step, and how many parameters it trains."""
    loss = {SQUARES: squared_error, LAPLACIAN: laplacian_residual}[cell["loss"]]
    x = random_inputs(batch, cell["widths"][0], device)
    subjects, trainable = {}, {}
    for name, adapt in METHODS.items():
        if name == "frozen base" and cell["loss"] == LAPLACIAN:
            continue  # has no parameters by which the residual is differentiated
        model = adapt(make_kan(cell["kan"], cell["widths"], device))
        subjects[name], trainable[name] = training_step(model, x, loss), count_trainable(model)
    return subjects, trainable


def too_slow(cell: dict, device: torch.device, probe: int = 16) -> str | None:
    """The reason why a cell takes too long, estimated from a part of its batch, or None; small cells are not tried."""
    if cell["batch"] * cell["widths"][0] < 2**21:
        return None
    subjects, _ = make_subjects(cell, cell["batch"] // probe, device)
    for parts in subjects.values():
        time_parts(parts, device)
    seconds = probe * sum(time_parts(parts, device)["total"] for parts in subjects.values()) / 1e3
    if seconds <= LIMIT_SECONDS:
        return None
    return f"would take about {seconds:.0f} s in a round of all, more than {LIMIT_SECONDS:.0f} s"
