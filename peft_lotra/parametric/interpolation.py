# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Interpolation between the fitted members of a family: the weight of each at a parameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


_INSIDE = 1e-9  # of the extent of the members: rounding at the ends of the range


class Scale:
    """Brings parameters (dim,) to coordinates in [0, 1] by the bounds of a range, or their logarithms.

    Args:
        low, high: The bounds of the range in each dimension.
        log: Whether the dimension is scaled by the logarithm.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], log: Sequence[bool]) -> None:
        self.log = list(log)
        self.low, self.high = self._raw(low), self._raw(high)

    def _raw(self, points: Sequence) -> Tensor:
        values = torch.tensor(points, dtype=torch.float64, device="cpu")
        return torch.where(torch.tensor(self.log, device="cpu"), values.clamp(min=1e-300).log(), values)

    def __call__(self, points: Sequence) -> Tensor:
        """Coordinates (n, dim), or (dim,), of one or more parameters."""
        extent = self.high - self.low
        return (self._raw(points) - self.low) / torch.where(extent > 0, extent, torch.ones_like(extent))

    def inverse(self, coordinates: Tensor) -> list[tuple[float, ...]]:
        """The parameters of coordinates (n, dim)."""
        raw = self.low + coordinates * (self.high - self.low)
        return [tuple(row) for row in torch.where(torch.tensor(self.log, device="cpu"), raw.exp(), raw).tolist()]


def weights_at(points: Tensor, at: Tensor) -> Tensor:
    """The weights (m,) of values at m points (m, dim) in their interpolation at a place (dim,), or (m, n) at n places.

    A polyharmonic spline with the polynomial of highest degree, up to 2, that the points determine: in one dimension a
    natural quintic spline. Polynomials of that degree are reproduced, also outside of the points.

    Source: H. Wendland, "Scattered Data Approximation", 2005, sections 8.3 and 8.5.
    """
    count = len(points)
    for degree in (2, 1, 0):
        tail = _monomials(points, degree)
        if tail.shape[1] <= count and torch.linalg.matrix_rank(tail, rtol=1e-8) == tail.shape[1]:
            break
    power = 2 * degree + 1
    size = count + tail.shape[1]
    matrix, places = points.new_zeros(size, size), at.reshape(-1, points.shape[1])
    matrix[:count, :count] = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") ** power
    matrix[:count, count:], matrix[count:, :count] = tail, tail.T
    distances = torch.cdist(points, places, compute_mode="donot_use_mm_for_euclid_dist")
    right = torch.cat([distances**power, _monomials(places, degree).T])
    weights = torch.linalg.solve(matrix, right)[:count]
    return weights if at.dim() > 1 else weights.squeeze(1)


def _monomials(points: Tensor, degree: int) -> Tensor:
    """The monomials of at most this degree, (n, number)."""
    dim = points.shape[1]
    exponents = [e for e in itertools.product(range(degree + 1), repeat=dim) if sum(e) <= degree]
    return torch.stack([(points ** points.new_tensor(e)).prod(dim=1) for e in exponents], dim=1)


def nearest(points: Tensor, at: Tensor) -> list[int]:
    """The points that an extrapolation uses: as many of the nearest as determine a quadratic polynomial."""
    most = math.comb(points.shape[1] + 2, 2)
    distances = (points - at).norm(dim=1)
    return sorted(range(len(points)), key=lambda index: (distances[index].item(), index))[:most]


def is_inside(points: Tensor, at: Tensor) -> bool:
    """Whether a place (dim,) lies in the convex hull of points (m, dim)."""
    if points.shape[1] == 1:
        return bool(points.min() - _INSIDE <= at[0] <= points.max() + _INSIDE)
    from scipy.optimize import nnls  # a dependency of tensorly; slow to import

    # a convex combination: non-negative weights whose sum is 1
    matrix = torch.cat([points, torch.ones_like(points[:, :1])], dim=1).T.numpy()
    _, missed = nnls(matrix, torch.cat([at, at.new_ones(1)]).numpy())
    return bool(missed <= 1e-7)
