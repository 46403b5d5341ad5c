# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Boxes: the domains of all blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_box(low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The ends of a box as float64 tensors (I,); raises a `ValueError` if it is empty or not finite."""
    ends = [torch.as_tensor(end, dtype=torch.float64, device="cpu").detach() for end in (low, high)]
    if ends[0].dim() != 1 or ends[0].shape != ends[1].shape or not len(ends[0]):
        raise ValueError(f"`low` is {low} and `high` is {high}, but they must be equally many numbers, at least one.")
    if not (torch.stack(ends).isfinite().all() and (ends[0] < ends[1]).all()):
        raise ValueError(f"`low` is {low} and `high` is {high}, but each `low` must be finite and below its `high`.")
    return ends[0], ends[1]
