# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Held-out points of residual terms: rows in the gaps between those of the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from ..least_squares.problem import Term
from .interpolation import weights_at


FEWEST = 16  # points; of fewer, as at the two ends of an interval, the neighbors are far
MOST = 1024  # points whose distances are computed; of more, some are left out
NEAR = 16  # nearest points among which the ends of gaps are searched
ROWS = 3  # rows from each point
SHARE = 0.382  # of the way to a near point
SHARED = 1 / 8  # of the points: a coordinate that so many have is a side of the domain, and is kept
SMOOTH = 0.02  # the largest relative error of smooth data, where half of them is interpolated from the others


@torch.no_grad()
def inputs_of(rows: Sequence[Tensor], network: Callable) -> tuple[Tensor, list[int]] | None:
    """The inputs (n, I) of the network in the rows of a term, in float64, and the indices of their tensors; or None.

    They are the first tensors that change from row to row, as many as the network takes.
    """
    changing = [index for index, row in enumerate(rows) if row.is_floating_point() and not _is_constant(row)]
    for count in range(1, len(changing) + 1):
        inputs = torch.cat([rows[index].double().reshape(len(rows[index]), -1) for index in changing[:count]], dim=1)
        with suppress(Exception):  # what a network raises depends on it
            if isinstance(network(inputs[:2]), Tensor):
                return inputs, changing[:count]
    return None


def _is_constant(row: Tensor) -> bool:
    return bool((row == row[:1]).all())


class HeldOutPoints:
    """Terms at rows in the gaps between those of the fit, where the fit has not made their residuals small.

    A term has none if it has few rows, or if a tensor beside its inputs, such as a right-hand side, is no smooth
    function of them, so that its values in the gaps are not known.
    """

    def __init__(self) -> None:
        self._gaps: dict[int, _Gaps] = {}  # of the last rows of each term

    def __reduce__(self):
        return HeldOutPoints, ()  # other processes find their own

    def of(self, terms: Sequence[Term], network: Callable) -> list[Term]:
        """The terms at other rows, without those that have none."""
        moved = [(term[0], self._moved(index, term[1], network), term[2]) for index, term in enumerate(terms)]
        return [(function, rows, weight) for function, rows, weight in moved if rows is not None]

    def _moved(self, index: int, rows: Sequence[Tensor], network: Callable) -> tuple[Tensor, ...] | None:
        rows = [row[:: math.ceil(len(row) / MOST)] for row in rows]
        found = inputs_of(rows, network) if len(rows[0]) >= FEWEST else None
        if found is None:
            return None
        inputs, used = found
        gaps = self._gaps.get(index)
        if gaps is None or not torch.equal(gaps.inputs, inputs):
            gaps = self._gaps[index] = _Gaps(inputs)
        new = [gaps.line(row) if place in used else gaps.data(row) for place, row in enumerate(rows)]
        known = [row for row in new if row is not None]
        return tuple(known) if len(gaps.first) and len(known) == len(rows) else None


class _Gaps:
    """Pairs of near points without another in between, in one dimension the neighbors, and data between them.

    A pair has the same coordinate, where many points share one.

    Source: K. R. Gabriel and R. R. Sokal, "A new statistical approach to geographic variation analysis", 1969, for the
    pairs of points whose circle holds no other.
    """

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        extent = inputs.amax(0) - inputs.amin(0)
        scaled = inputs / extent.where(extent > 0, 1.0)
        distances = torch.cdist(scaled, scaled).fill_diagonal_(math.inf)
        self._is_first = distances.masked_fill(torch.ones_like(distances).triu() > 0, math.inf).amin(1) > 1e-6
        for column in inputs.T:
            equal = column.unsqueeze(1) == column
            is_shared = equal.sum(1) > SHARED * len(inputs)
            distances[is_shared.unsqueeze(1) & ~equal] = math.inf
        near = distances.topk(min(NEAR, len(inputs) - 1), largest=False)
        middles = torch.lerp(scaled.unsqueeze(1), scaled[near.indices], 0.5)
        free = torch.stack([torch.cdist(part, scaled).amin(1) for part in middles.unbind(1)], dim=1)
        is_open = near.values.isfinite() & (free > 0.499 * near.values) & (free > 1e-9)
        longest = near.values.where(is_open, 0.0).topk(min(ROWS, is_open.shape[1]))
        self.first, rank = longest.values.nonzero(as_tuple=True)
        self.second = near.indices.gather(1, longest.indices)[self.first, rank]
        self._known, self._places = scaled[self._is_first], self.line(scaled)  # without points that are there twice

    def line(self, row: Tensor) -> Tensor:
        """Values (n, ...) that are linear in the inputs, in the gaps (m, ...)."""
        return torch.lerp(row[self.first], row[self.second], SHARE)

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        return weights_at(self._known, self._places), weights_at(self._known[::2], self._known[1::2])

    def data(self, row: Tensor) -> Tensor | None:
        """Values (n, ...) interpolated to the gaps, (m, ...); None if half of them does not tell the others."""
        if _is_constant(row):
            return row[self.first]
        values = row[self._is_first].double().reshape(len(self._known), -1)
        weights, of_half = self._weights
        others = values[1::2]
        if not (of_half.T @ values[::2] - others).norm() <= SMOOTH * (others - others.mean(0)).norm():
            return None
        return (weights.T @ values).to(row.dtype).view(-1, *row.shape[1:])
