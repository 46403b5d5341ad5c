# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The order in which parameters of a family are fitted, at places in the unit cube (the scaled range)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


STRIDE = 1 / 8  # of the range: how far a member may start from the nearest one
BATCH = 4  # members that a round of the greedy choice adds at most


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
    within = [index for index in range(len(pending)) if distances[index] <= limit]
    return _apart(pending, within, distances, limit)


def greedy_batch(candidates: Tensor, shares: Tensor, members: Tensor, bound: float) -> list[int]:
    """The indices of the candidates (n, dim) of the largest shares above a bound, at most one between two members."""
    distances = torch.cdist(candidates, members).amin(dim=1)
    above = [index for index in range(len(candidates)) if shares[index] > bound and distances[index] > 1e-6]
    if not above:
        return []
    worst = max(above, key=lambda index: (shares[index].item(), -index))
    return _apart(candidates, above, shares, 2 * distances[worst].item())[:BATCH]


def _apart(points: Tensor, indices: list[int], priority: Tensor, distance: float) -> list[int]:
    """The points of highest priority, no two of them nearer than a distance."""
    chosen: list[int] = []
    for index in sorted(indices, key=lambda i: (-round(priority[i].item(), 9), i)):
        if all((points[index] - points[other]).norm() >= distance * (1 - 1e-6) for other in chosen):
            chosen.append(index)
    return chosen


def nearby_means(places: Tensor, members: Tensor, values: Tensor) -> Tensor:
    """At each place (n, dim) the geometric mean of the nearest members' values (m,), weighted by inverse distance."""
    distances = torch.cdist(places, members).clamp(min=1e-12)
    near = distances.topk(min(1 + members.shape[1], len(members)), dim=1, largest=False)
    weights = 1 / near.values
    logarithms = values.double().clamp(min=1e-300).log()[near.indices]
    return ((weights * logarithms).sum(1) / weights.sum(1)).exp()


def skeleton(dim: int, most: int) -> Tensor:
    """Places (n, dim) that span the unit cube: the corners, and points between them in one and two dimensions.

    There are at most `most`, which is at least the number of corners.
    """
    levels = {1: 9, 2: 3}.get(dim, 2)
    while levels**dim > most:
        levels -= 1
    line = torch.linspace(0, 1, levels, dtype=torch.float64, device="cpu").tolist()
    points = list(itertools.product(line, repeat=dim))
    if dim > 2 and len(points) < most:
        points.append((0.5,) * dim)
    return torch.tensor(points, dtype=torch.float64, device="cpu")


def candidates(dim: int) -> Tensor:
    """Places (n, dim) at which predictions are checked: a grid in one dimension, Sobol points in more."""
    if dim == 1:
        return torch.linspace(0, 1, 65, dtype=torch.float64, device="cpu").unsqueeze(1)
    return torch.quasirandom.SobolEngine(dim).draw(65 * dim, dtype=torch.float64)[1:]
