# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Boxes: ends and sides as arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


Side = tuple[int, str]  # the index of a coordinate, and "low" or "high"


def check_box(low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The ends of a box as float64 tensors (I,); raises a `ValueError` if it is empty or not finite."""
    try:
        ends = torch.stack([torch.as_tensor(end, dtype=torch.float64, device="cpu").detach() for end in (low, high)])
    except (TypeError, ValueError, RuntimeError):  # text, None, or different numbers of them
        ends = torch.empty(0)
    if ends.dim() != 2 or not ends.numel() or not (ends.isfinite().all() and (ends[0] < ends[1]).all()):
        raise ValueError(
            f"`low` is {low} and `high` is {high}, but they must be equally many finite numbers, at least one, and "
            "each `low` below its `high`."
        )
    return ends[0], ends[1]


def sides_of_box(count: int) -> list[Side]:
    """All sides of a box of `count` coordinates."""
    return [(i, end) for i in range(count) for end in ("low", "high")]


def check_sides(sides: Iterable[Side] | None, known: list[Side], argument: str = "sides") -> list[Side]:
    """The sides, each once, by default all known ones; raises a `ValueError` for an unknown one."""
    sides = list(dict.fromkeys(known if sides is None else sides))
    if wrong := [side for side in sides if side not in known]:
        raise ValueError(f"`{argument}` has {wrong[0]!r:.100}, which is none of {known}.")
    return sides
