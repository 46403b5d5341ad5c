# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Points that a fit has not seen, where a user gives none: between those of the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..optim.least_squares import Term


FEWEST = 16  # points; of fewer, as at the two ends of an interval, the neighbors are far
MOST = 2048  # points that get neighbors, since all distances are computed
SHARE = 0.382  # of the way to a neighbor: halfway to the second neighbor on a line there is another point
SHARED = 1 / 8  # of the points: a coordinate that so many have is a side of the domain, and is kept

Takes = Callable[[Tensor], bool]  # whether the network takes inputs


def inputs_of(rows: Sequence[Tensor], takes: Takes) -> tuple[Tensor, list[int]] | None:
    """The inputs (n, I) of the network in the rows of a term, and which of the tensors they are; None if not found.

    They are the first tensors that change from row to row, as many as the network takes, or else the first ones.
    """
    changing = [index for index, row in enumerate(rows) if not _is_constant(row)]
    for order in (changing, list(range(len(rows)))):
        for count in range(1, len(order) + 1):
            parts = [rows[index] for index in order[:count]]
            if not all(part.is_floating_point() and (part.dim() < 3 or count == 1) for part in parts):
                break
            parts = [part.double().unsqueeze(1) if part.dim() == 1 else part.double() for part in parts]
            inputs = torch.cat(parts, dim=1)
            if takes(inputs[:2]):
                return inputs, order[:count]
    return None


class PointsBetween:
    """Rows between those of terms, so that a residual there is one that no fit has made small.

    A term has none if it has few rows, or if a tensor beside its inputs changes from row to row: data, whose values
    between are not known.
    """

    def __init__(self) -> None:
        self._neighbors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, terms: Sequence[Term], takes: Takes) -> list[Term]:
        """The terms at other rows, without those that have none."""
        return [
            (function, rows, weight)
            for index, (function, given, weight) in enumerate(terms)
            for rows in self._between(index, given, takes)
        ]

    def _between(self, index: int, rows: Sequence[Tensor], takes: Takes) -> list[tuple[Tensor, ...]]:
        found = inputs_of(rows, takes) if len(rows[0]) >= FEWEST else None
        if found is None or found[0].dim() > 2:
            return []
        inputs, used = found
        if not all(_is_constant(row) for other, row in enumerate(rows) if other not in used):
            return []
        known = self._neighbors.get(index)
        if known is None or not torch.equal(known[0], inputs):
            known = self._neighbors[index] = (inputs, *_pairs(inputs))
        _, first, second = known
        if not len(first):
            return []
        return [
            tuple(
                torch.lerp(row[first], row[second], SHARE) if other in used else row[first]
                for other, row in enumerate(rows)
            )
        ]


def _is_constant(row: Tensor) -> bool:
    return bool((row == row[:1]).all())


def _pairs(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of points (n, I) and of near ones, which have the same coordinates where many points share one."""
    indices = torch.arange(0, len(inputs), math.ceil(len(inputs) / MOST), device=inputs.device)
    points = inputs[indices]
    extent = points.amax(0) - points.amin(0)
    scaled = points / extent.where(extent > 0, torch.ones_like(extent))
    distances = torch.cdist(scaled, scaled).fill_diagonal_(math.inf)
    for column in points.T:
        equal = column.unsqueeze(1) == column
        shared = equal.sum(1) > SHARED * len(points)
        distances[shared.unsqueeze(1) & ~equal] = math.inf
    count = min(2 * points.shape[1], len(points) - 1)
    near = distances.topk(count, largest=False)
    places = torch.arange(len(points), device=inputs.device)
    chosen = near.indices[places, places % count]  # not always the nearest, which is often mutual
    found = near.values[places, places % count].isfinite()
    return indices[found], indices[chosen[found]]
