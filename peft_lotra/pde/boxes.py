# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Boxes: the domains of all blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_box(low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The ends of a box as float64 tensors (I,); raises a `ValueError` if it is empty or not finite."""
    try:
        ends = [torch.as_tensor(end, dtype=torch.float64, device="cpu").detach() for end in (low, high)]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # None, text, 10**400, the meta device
        ends = [torch.empty(0, device="cpu")] * 2
    if ends[0].dim() != 1 or ends[0].shape != ends[1].shape or not len(ends[0]):
        raise ValueError(f"`low` is {low} and `high` is {high}, but they must be equally many numbers, at least one.")
    if not ((ends[1] - ends[0]).isfinite().all() and (ends[0] < ends[1]).all()):
        raise ValueError(f"`low` is {low} and `high` is {high}, but each `low` must be finite and below its `high`.")
    return ends[0], ends[1]


def check_sides(sides: Any, count: int) -> list[tuple[int, str]]:
    """The sides of a box of `count` coordinates, all of them for None; raises a `ValueError` for what is no side."""
    every = [(i, end) for i in range(count) for end in ("low", "high")]
    if sides is None:
        return every
    return check_known(sides, every, "sides")


def check_known(given: Any, known: Sequence[tuple[int, str]], argument: str) -> list[tuple[int, str]]:
    """The given sides, which must be a collection of known ones."""
    if not isinstance(given, Iterable):
        raise TypeError(f"`{argument}` is {given!r:.100}, but must be a list of {list(known)}.")
    given = list(given)
    if wrong := [side for side in given if side not in known]:
        raise ValueError(f"`{argument}` has {wrong[0]!r:.100}, which is none of {list(known)}.")
    return [known[known.index(side)] for side in given]
