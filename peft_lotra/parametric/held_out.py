# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Held-out points of residual terms: rows in the gaps between the rows of the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

from ..least_squares.problem import Term
from .interpolation import pairwise_distances, weights_at


FEWEST = 16  # points; between fewer, as between the two ends of an interval, the gaps are wide
MOST = 1024  # points whose distances are computed; of more, some are left out
NEAR = FEWEST - 1  # nearest points among which the other end of a gap is searched
ROWS = 3  # rows from each point
SHARE = 0.382  # of the way to a near point
SHARED = 1 / 8  # of the points: a coordinate that so many have is a side of the domain, and is kept
SMOOTH = 0.02  # the largest relative error of smooth data, where half of them is interpolated from the other half


def held_out_terms(terms: Sequence[Term], network: Callable) -> dict[int, Term]:
    """Return terms, by their index, at rows in the gaps, where the fit has not made their residuals small.

    A term is left out if it has few rows. It is also left out if another tensor, such as a right-hand side, is no
    smooth function of the inputs: its values in the gaps are not known.
    """
    held_out = {}
    for number, (function, rows, weight) in enumerate(terms):
        stride = math.ceil(len(rows[0]) / MOST)
        rows = [row[::stride] for row in rows]
        inputs, indices = inputs_of(rows, network)
        if inputs is None or len(inputs) < FEWEST:
            continue
        content = inputs.cpu().numpy().tobytes()
        gaps = _find_gaps(content, inputs.shape[1])
        between = []
        for index, row in enumerate(rows):
            between.append(gaps.line(row) if index in indices else gaps.data(row))
        if len(gaps.first) and all(row is not None for row in between):
            held_out[number] = function, tuple(between), weight
    return held_out


@torch.no_grad()
def inputs_of(
    rows: Sequence[Tensor],
    network: Callable,
) -> tuple[Tensor | None, list[int]]:
    """Return the inputs (n, I) of the network in the rows of a term, in float64, and the indices of their tensors.

    They are the first tensors that change from row to row, as many as the network takes; None if there are none.
    """
    indices = []
    columns = []
    for index, row in enumerate(rows):
        if not row.is_floating_point() or _is_constant(row):
            continue
        indices.append(index)
        columns.append(row.double().reshape(len(row), -1))
        inputs = torch.cat(columns, dim=1)
        with suppress(Exception):  # what a network raises depends on it
            if isinstance(network(inputs[:2]), Tensor):
                return inputs, indices
    return None, []


def _is_constant(row: Tensor) -> bool:
    return bool((row == row[:1]).all())


class _Gaps:
    """Pairs of near points without another in between, in one dimension the neighbors, and data between them.

    If many points share a coordinate, a pair has the same one.

    Source: K. R. Gabriel and R. R. Sokal, "A new statistical approach to geographic variation analysis", 1969.
    """

    def __init__(self, content: bytes, width: int) -> None:
        points = torch.frombuffer(bytearray(content), dtype=torch.float64).view(-1, width)
        extent = points.amax(0) - points.amin(0)
        scaled = points / extent.where(extent > 0, 1.0)
        distances = torch.cdist(scaled, scaled).fill_diagonal_(math.inf)
        # a matrix of distances with a point twice would be singular
        self._is_first = ~(distances <= 1e-6).tril().any(1)

        is_equal = points.unsqueeze(1) == points
        is_shared = is_equal.sum(1, keepdim=True) > SHARED * len(points)
        leaves_side = is_shared & ~is_equal
        distances[leaves_side.any(2)] = math.inf

        near = distances.topk(NEAR, largest=False)
        # neighbors in the Gabriel graph: the ball between them is empty
        middles = torch.lerp(scaled.unsqueeze(1), scaled[near.indices], 0.5)
        closest = pairwise_distances(middles, scaled).amin(-1)
        is_empty = closest > 0.499 * near.values
        longest = near.values.where(is_empty, 0.0).topk(ROWS)
        ends = near.indices.gather(1, longest.indices)
        self.first, rank = longest.values.nonzero(as_tuple=True)
        self.second = ends[self.first, rank]

        distinct = scaled[self._is_first]
        self._weights = weights_at(distinct, self.line(scaled))
        self._weights_of_half = weights_at(distinct[::2], distinct[1::2])

    def line(self, row: Tensor) -> Tensor:
        """Return values (n, ...) that are linear in the inputs, in the gaps (m, ...)."""
        return torch.lerp(row[self.first], row[self.second], SHARE)

    def data(self, row: Tensor) -> Tensor | None:
        """Interpolate values (n, ...) to the gaps, (m, ...); None if half of them does not tell the other half."""
        if _is_constant(row):
            return row[self.first]
        values = row[self._is_first].double().cpu()
        values = values.reshape(len(values), -1)
        half = values[1::2]
        error = self._weights_of_half.T @ values[::2] - half
        deviations = half - half.mean(0)
        if not error.norm() <= SMOOTH * deviations.norm():
            return None
        interpolated = self._weights.T @ values
        return interpolated.to(row).view(-1, *row.shape[1:])


# by the points: a fit asks for the same ones at each parameter
_find_gaps = lru_cache(maxsize=16)(_Gaps)
