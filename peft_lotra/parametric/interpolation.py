# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fitted members of a family: their table, and the interpolation between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ..modules.checks import as_number
from ..modules.report import Report, TextTable


Point = tuple[float, ...]

pairwise_distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


class Member(NamedTuple):
    """A fitted member of a family."""

    parameter: Point
    vector: np.ndarray  # (P,), the trained parameters of the adapter, in float64
    predicted: float  # the indicator of the prediction at its parameter before the fit
    indicator: float  # the indicator of the member
    steps: int
    seconds: float


class FamilyReport(Report, list[Member]):
    """The members that a fit added, or that a file holds, a list that prints as a table.

    Attributes:
        failed: Errors by parameter: of your functions, which leave no member, and of members that did not converge.
        largest: In a range, the largest indicator of a prediction, as a share of its bound; NaN otherwise.
        coordinates: The number of coordinates of a member.
    """

    def __init__(
        self,
        members: Iterable[Member],
        failed: Mapping[Any, str],
        largest: float,
        coordinates: int,
    ) -> None:
        super().__init__(sorted(members, key=lambda member: member.parameter))
        self.failed = dict(failed)
        self.largest = largest
        self.coordinates = coordinates

    def _table(self) -> TextTable:
        rows = []
        for member in self:
            cells = [f"{member.predicted:.2e}", f"{member.indicator:.2e}", str(member.steps), f"{member.seconds:.2f}"]
            cells = [cell.replace("nan", "-") for cell in cells]
            rows.append([text_of(member.parameter), *cells])
        notes = [f"{len(self)} members of {self.coordinates:,} coordinates"]
        if not math.isnan(self.largest):
            notes.append(f"largest indicator in the range: {self.largest:.2g} of its bound")
        notes += [f"failed: {parameter}: {error}" for parameter, error in self.failed.items()]
        return TextTable(["parameter", ">predicted", ">fitted", ">steps", ">s"], rows, notes)

    def as_dict(self) -> dict[str, Any]:
        """Return the table in plain values, for JSON, without the coordinates of the members; None for NaN."""
        rows: Any = super().as_dict()
        for row in rows:
            del row["vector"]
        failed = {str(parameter): error for parameter, error in self.failed.items()}
        largest = None if math.isnan(self.largest) else self.largest
        return {"members": rows, "failed": failed, "largest": largest, "coordinates": self.coordinates}


def text_of(point: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in point)


def ranges_of(points: Sequence[Point]) -> list[str]:
    """Return the range of each parameter, as text."""
    return [f"{min(axis):g} to {max(axis):g}" for axis in zip(*points, strict=True)]


class MemberSpace:
    """The members of a family, whose coordinates are interpolated.

    Positions are parameters, or their logarithms, scaled to [0, 1] by their range.

    Args:
        size: The number of coordinates of a member.
        log: Whether a parameter is scaled by its logarithm; one flag for all, or one for each.
    """

    def __init__(self, size: int, log: bool | Sequence[bool]) -> None:
        self.size = size
        self.log = torch.tensor(log, dtype=torch.bool, device="cpu")
        self.members: list[Member] = []
        self.positions = torch.empty(0, 1, device="cpu")  # of the members
        self._low = self.extent = torch.zeros(1, device="cpu")

    def point(self, parameter: Any, dim: int | None = None) -> Point:
        """Return the parameter as a tuple of `dim` numbers, by default as many as the members have."""
        values = np.ravel(parameter).tolist()
        point = tuple(map(as_number, values))
        dim = dim or len(point) or 1
        if self.log.dim():
            dim = len(self.log)
        elif self.members:
            dim = self.positions.shape[1]
        if len(point) != dim or not self._raw([point]).isfinite().all():
            numbers = "a finite number" if dim == 1 else f"{dim} finite numbers"
            raise ValueError(f"A parameter is {parameter!r:.100}, but must be {numbers}, above 0 with `log=True`.")
        return point

    def spread(self, points: Sequence[Point]) -> None:
        """Set the range of parameters to the range of these points and the members."""
        fitted = [member.parameter for member in self.members]
        raw = self._raw([*points, *fitted])
        self._low = raw.amin(0)
        self.extent = raw.amax(0) - self._low
        self.add(())

    def add(self, members: Iterable[Member]) -> None:
        """Add members, which replace members of the same parameters."""
        merged = {member.parameter: member for member in [*self.members, *members]}
        points = sorted(merged)
        self.members = [merged[point] for point in points]
        if points:
            self.positions = self.positions_of(points)
            self._vectors = np.stack([member.vector for member in self.members])

    def _raw(self, points: Sequence[Point]) -> Tensor:
        values = torch.tensor(points, dtype=torch.float64, device="cpu")
        return torch.where(self.log, values.log(), values)

    def positions_of(self, points: Sequence[Point]) -> Tensor:
        """Return the positions (n, dim) of parameters."""
        extent = self.extent.where(self.extent > 0, 1.0)
        return (self._raw(points) - self._low) / extent

    def points_at(self, positions: Tensor) -> list[Point]:
        """Return the parameters at positions (n, dim)."""
        raw = self._low + positions * self.extent
        points = torch.where(self.log, raw.exp(), raw)
        return [tuple(point) for point in points.tolist()]

    def is_inside(self, point: Point) -> bool:
        """Return whether a parameter lies in the convex hull of the members."""
        return is_inside(self.positions, self.positions_of([point])[0])

    def nearest(self, point: Point) -> list[int]:
        """Return the indices of the nearest members, as many as determine a quadratic polynomial, in order."""
        position = self.positions_of([point])
        distances = (self.positions - position).norm(dim=1)
        count = math.comb(self.positions.shape[1] + 2, 2)
        return distances.argsort(stable=True)[:count].tolist()

    def around(self, point: Point) -> list[tuple[Member, float]]:
        """Return the nearest members, one more than there are parameters, with weights by their distances."""
        position = self.positions_of([point])
        used = self.nearest(point)[: position.numel() + 1]
        members = [self.members[index] for index in used]
        distances = (self.positions[used] - position).norm(dim=1)
        inverse = 1 / distances.clamp(min=1e-12)
        weights = inverse / inverse.sum()
        return list(zip(members, weights.tolist(), strict=True))

    def vector_at(self, point: Point) -> np.ndarray:
        """Interpolate the coordinates (P,); outside of the members, extrapolate them from the nearest."""
        if not self.members:
            return np.zeros(self.size)
        used = slice(None) if self.is_inside(point) else self.nearest(point)
        return self.vectors_at(self.positions_of([point]), used)[0]

    def vectors_at(self, positions: Tensor, used: Any = slice(None)) -> np.ndarray:
        """Interpolate the coordinates (n, P) at positions (n, dim) from the members of some indices, or from all."""
        weights = weights_at(self.positions[used], positions).numpy()
        return weights.T @ self._vectors[used]


def weights_at(points: Tensor, positions: Tensor) -> Tensor:
    """Compute the weights (m, n) of values at m points (m, dim) in their interpolation at n positions (n, dim).

    A polyharmonic spline with the polynomial of highest degree, up to 2, that the points determine: in one dimension a
    natural quintic spline. Polynomials of that degree are reproduced, also outside of the points.

    Source: H. Wendland, "Scattered Data Approximation", 2005, sections 8.3 and 8.5.
    """
    count = len(points)
    for degree in (2, 1, 0):
        monomials = _monomials(points, degree)
        number = monomials.shape[1]
        if torch.linalg.matrix_rank(monomials, rtol=1e-8) == number:
            break
    power = 2 * degree + 1
    # SciPy's RBFInterpolator of unit values inverts the matrix, which loses digits where points are close
    matrix = points.new_zeros(count + number, count + number)
    matrix[:count, :count] = pairwise_distances(points, points) ** power
    matrix[:count, count:] = monomials
    matrix[count:, :count] = monomials.T
    splines = pairwise_distances(points, positions) ** power
    right = torch.cat([splines, _monomials(positions, degree).T])
    solution = torch.linalg.solve(matrix, right)
    return solution[:count]


def _monomials(points: Tensor, degree: int) -> Tensor:
    """Compute the monomials of at most this degree, (n, number)."""
    monomials = []
    for exponents in itertools.product(range(degree + 1), repeat=points.shape[1]):
        if sum(exponents) <= degree:
            powers = points ** points.new_tensor(exponents)
            monomials.append(powers.prod(1))
    return torch.stack(monomials, dim=1)


def is_inside(points: Tensor, position: Tensor) -> bool:
    """Return whether a position (dim,) lies in the convex hull of points (m, dim)."""
    # a convex combination: non-negative weights whose sum is 1
    matrix = np.vstack([points.numpy().T, np.ones(len(points))])
    right = np.append(position.numpy(), 1.0)
    _, distance = nnls(matrix, right)
    return distance <= 1e-7
