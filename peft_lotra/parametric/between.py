# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Points that a fit has not seen, where a user gives none: between those of the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..optim.least_squares import Term
from .interpolation import weights_at


FEWEST = 16  # points; of fewer, as at the two ends of an interval, the neighbors are far
MOST = 1024  # points from which there are others, since all distances are computed
NEAR = 16  # points nearby among which are those across a gap
ROWS = 3  # rows from each point
SHARE = 0.382  # of the way to a near point
SHARED = 1 / 8  # of the points: a coordinate that so many have is a side of the domain, and is kept
SMOOTH = 0.02  # the error of data, relative to what they vary by, where half of them is interpolated from the others

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


class _Gaps(NamedTuple):
    """Where the points between those of a term are, and the data there."""

    inputs: Tensor  # (n, I) of the term
    first: Tensor  # (m,), the points that they are near to
    second: Tensor  # (m,), those that they are on the way to
    data: Callable[[Tensor], Tensor | None]  # from (n, ...) to (m, ...); None if they are not smooth


class PointsBetween:
    """Rows in the gaps between those of terms, so that a residual there is one that no fit has made small.

    A term has none if it has few rows, or if a tensor beside its inputs, such as a right-hand side, is no smooth
    function of them, so that its values between are not known.
    """

    def __init__(self) -> None:
        self._gaps: dict[int, _Gaps] = {}

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
        gaps = self._gaps.get(index)
        if gaps is None or not torch.equal(gaps.inputs, inputs):
            gaps = self._gaps[index] = _find_gaps(inputs)
        if not len(gaps.first):
            return []
        new = []
        for other, row in enumerate(rows):
            if other in used:
                row = torch.lerp(row[gaps.first], row[gaps.second], SHARE)
            else:
                row = row[gaps.first] if _is_constant(row) else gaps.data(row)
            if row is None:
                return []
            new.append(row)
        return [tuple(new)]


def _is_constant(row: Tensor) -> bool:
    return bool((row == row[:1]).all())


def _find_gaps(inputs: Tensor) -> _Gaps:
    """From each point the longest ways to near ones between which there is no other: in one dimension to both sides.

    A way ends at a point with the same coordinate, where many points share one.

    Source: K. R. Gabriel and R. R. Sokal, "A new statistical approach to geographic variation analysis", 1969, for the
    pairs of points whose circle holds no other."""
    indices = torch.arange(0, len(inputs), math.ceil(len(inputs) / MOST), device=inputs.device)
    points = inputs[indices]
    extent = points.amax(0) - points.amin(0)
    scaled = points / extent.where(extent > 0, torch.ones_like(extent))
    distances = torch.cdist(scaled, scaled).fill_diagonal_(math.inf)
    alone = distances.tril(-1).where(torch.ones_like(distances).tril(-1) > 0, math.inf).amin(1) > 1e-6
    for column in points.T:
        equal = column.unsqueeze(1) == column
        shared = equal.sum(1) > SHARED * len(points)
        distances[shared.unsqueeze(1) & ~equal] = math.inf
    near = distances.topk(min(NEAR, len(points) - 1), largest=False)
    middles = torch.lerp(scaled.unsqueeze(1), scaled[near.indices], 0.5)
    free = torch.stack([torch.cdist(part, scaled).amin(1) for part in middles.unbind(1)], dim=1)
    is_open = near.values.isfinite() & (free > 0.499 * near.values) & (free > 1e-9)  # no other point is in between
    longest = near.values.where(is_open, 0.0).topk(min(ROWS, is_open.shape[1]))
    is_gap = longest.values > 0
    first = torch.arange(len(points), device=inputs.device).unsqueeze(1).expand_as(is_gap)[is_gap]
    second = near.indices.gather(1, longest.indices)[is_gap]
    data = _Data(scaled[alone], torch.lerp(scaled[first], scaled[second], SHARE), indices[alone])
    return _Gaps(inputs, indices[first], indices[second], data)


class _Data:
    """Interpolates data at points to other places."""

    def __init__(self, points: Tensor, places: Tensor, indices: Tensor) -> None:
        self._points, self._places, self._indices = points, places, indices

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        halves = self._points[::2], self._points[1::2]
        return weights_at(self._points, self._places), weights_at(*halves)

    def __call__(self, row: Tensor) -> Tensor | None:
        """Values (n, ...) at the places, (m, ...); None if half of them does not tell the others."""
        if not row.is_floating_point():
            return None
        values = row[self._indices].double().flatten(1) if row.dim() > 1 else row[self._indices].double().unsqueeze(1)
        weights, of_half = self._weights
        known, others = values[::2], values[1::2]
        if not (of_half.T @ known - others).norm() <= SMOOTH * (others - others.mean(0)).norm():
            return None
        return (weights.T @ values).to(row.dtype).view(-1, *row.shape[1:])
