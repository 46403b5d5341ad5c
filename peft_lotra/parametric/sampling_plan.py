# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The order in which parameters of a family are fitted, at places in the unit cube (the scaled range)."""

from __future__ import annotations

import torch
from torch import Tensor


STRIDE = 1 / 8  # of the range: how far a member may start from the nearest one


def next_wave(pending: Tensor, members: Tensor, start: int) -> list[int]:
    """The indices of the `pending` places (n, dim) that are fitted together next.

    The walk leads outward from `start` in strides. The places between members then follow in one wave.
    """
    if not len(members):
        return [start]
    distances = torch.cdist(pending, members).amin(dim=1)
    if len(members) > 2 and distances.max() <= STRIDE * (1 + 1e-9):
        return list(range(len(pending)))
    limit = max(STRIDE, distances.min().item()) * (1 + 1e-9)
    wave: list[int] = []  # the farthest first, none nearer to another than the limit
    for index in sorted(range(len(pending)), key=lambda i: (-round(distances[i].item(), 9), i)):
        apart = all((pending[index] - pending[other]).norm() >= limit * (1 - 1e-6) for other in wave)
        if distances[index] <= limit and apart:
            wave.append(index)
    return wave


def grid(dim: int, level: int) -> Tensor:
    """The places (n, dim) of a grid of the unit cube with 2^level intervals along each side."""
    line = torch.linspace(0, 1, 2**level + 1, dtype=torch.float64, device="cpu")
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
