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
        failed: Errors by parameter: of functions of yours, where there is no member, and of members that did not
            converge.
        largest: In a range, the largest indicator of a prediction, as a share of its bound; NaN otherwise.
        coordinates: The number of coordinates of a member.
    """

    def __init__(self, members: Iterable[Member], failed: Mapping[Any, str], largest: float, coordinates: int) -> None:
        super().__init__(sorted(members, key=lambda member: member.parameter))
        self.failed = dict(failed)
        self.largest = largest
        self.coordinates = coordinates

    def _table(self) -> TextTable:
        rows = []
        for member in self:
            numbers = f"{member.predicted:.2e} {member.indicator:.2e} {member.steps} {member.seconds:.2f}"
            rows.append([text_of(member.parameter), *numbers.replace("nan", "-").split()])
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

    Places are parameters, or their logarithms, scaled to [0, 1] by their range.

    Args:
        size: The number of coordinates of a member.
        log: Whether a parameter is scaled by its logarithm; one flag for all, or one for each.
    """

    def __init__(self, size: int, log: bool | Sequence[bool]) -> None:
        self.size = size
        self.log = torch.tensor(log, dtype=torch.bool, device="cpu")
        self.members: list[Member] = []
        self.places = torch.empty(0, 1, device="cpu")  # of the members
        self._low = self.extent = torch.zeros(1, device="cpu")

    def point(self, parameter: Any) -> Point:
        """Return the parameter as a tuple, with as many numbers as the members have."""
        point = tuple(map(as_number, np.ravel(parameter).tolist()))
        dim = len(point)
        if self.log.dim():
            dim = len(self.log)
        elif self.members:
            dim = self.places.shape[1]
        if len(point) != dim or not self._raw([point]).isfinite().all():
            numbers = "a finite number" if dim == 1 else f"{dim} finite numbers"
            raise ValueError(f"A parameter is {parameter!r:.100}, but must be {numbers}, above 0 with `log=True`.")
        return point

    def spread(self, points: Sequence[Point]) -> None:
        """Set the range of parameters to that of these points and the members."""
        raw = self._raw([*points, *(member.parameter for member in self.members)])
        self._low = raw.amin(0)
        self.extent = raw.amax(0) - self._low
        self.add(())

    def add(self, members: Iterable[Member]) -> None:
        """Add members, which replace those of the same parameters."""
        merged = {member.parameter: member for member in [*self.members, *members]}
        self.members = [merged[point] for point in sorted(merged)]
        if self.members:
            self.places = self.places_of(sorted(merged))
            self._vectors = np.stack([member.vector for member in self.members])

    def _raw(self, points: Sequence[Point]) -> Tensor:
        values = torch.tensor(points, dtype=torch.float64, device="cpu")
        return torch.where(self.log, values.log(), values)

    def places_of(self, points: Sequence[Point]) -> Tensor:
        """Return the places (n, dim) of parameters."""
        return (self._raw(points) - self._low) / self.extent.where(self.extent > 0, 1.0)

    def points_at(self, places: Tensor) -> list[Point]:
        """Return the parameters at places (n, dim)."""
        raw = self._low + places * self.extent
        return [tuple(row) for row in torch.where(self.log, raw.exp(), raw).tolist()]

    def is_inside(self, point: Point) -> bool:
        """Return whether a parameter lies in the convex hull of the members."""
        return is_inside(self.places, self.places_of([point])[0])

    def nearest(self, point: Point) -> list[int]:
        """Return the indices of the nearest members, as many as determine a quadratic polynomial, in order."""
        distances = (self.places - self.places_of([point])).norm(dim=1)
        count = math.comb(self.places.shape[1] + 2, 2)
        return distances.argsort(stable=True)[:count].tolist()

    def around(self, point: Point) -> list[tuple[Member, float]]:
        """Return the members around a parameter, with weights by their distances; in one dimension those of a line.

        A member is around if no other is in the ball whose diameter leads to it from the parameter.
        """
        place = self.places_of([point])[0]
        distances = (self.places - place).norm(dim=1)
        is_around = empty_radii(self.places, place, self.places) >= 0.499 * distances
        order = distances.where(is_around, math.inf).argsort(stable=True)
        used = order[: min(len(place) + 1, int(is_around.sum()))].tolist()

        weights = 1 / distances[used].clamp(min=1e-12)
        shares = (weights / weights.sum()).tolist()
        return [(self.members[index], share) for index, share in zip(used, shares, strict=True)]

    def vector_at(self, point: Point) -> np.ndarray:
        """Interpolate the coordinates (P,); outside of the members, extrapolate them from the nearest."""
        if not self.members:
            return np.zeros(self.size)
        used = slice(None) if self.is_inside(point) else self.nearest(point)
        return self.vectors_at(self.places_of([point]), used)[0]

    def vectors_at(self, places: Tensor, used: Any = slice(None)) -> np.ndarray:
        """Interpolate the coordinates (n, P) at places (n, dim) from the members of some indices, by default all."""
        return weights_at(self.places[used], places).numpy().T @ self._vectors[used]


def weights_at(points: Tensor, places: Tensor) -> Tensor:
    """Compute the weights (m, n) of values at m points (m, dim) in their interpolation at n places (n, dim).

    A polyharmonic spline with the polynomial of highest degree, up to 2, that the points determine: in one dimension a
    natural quintic spline. Polynomials of that degree are reproduced, also outside of the points.

    Source: H. Wendland, "Scattered Data Approximation", 2005, sections 8.3 and 8.5.
    """
    count = len(points)
    for degree in (2, 1, 0):
        tail = _monomials(points, degree)
        number = tail.shape[1]
        if number <= count and torch.linalg.matrix_rank(tail, rtol=1e-8) == number:
            break
    power = 2 * degree + 1
    splines = pairwise_distances(points, points) ** power
    matrix = torch.cat([torch.cat([splines, tail], 1), torch.cat([tail.T, tail.new_zeros(number, number)], 1)])
    right = torch.cat([pairwise_distances(points, places) ** power, _monomials(places, degree).T])
    return torch.linalg.solve(matrix, right)[:count]


def _monomials(points: Tensor, degree: int) -> Tensor:
    """Compute the monomials of at most this degree, (n, number)."""
    exponents = itertools.product(range(degree + 1), repeat=points.shape[1])
    return torch.stack([(points ** points.new_tensor(e)).prod(1) for e in exponents if sum(e) <= degree], dim=1)


def empty_radii(first: Tensor, second: Tensor, points: Tensor) -> Tensor:
    """Compute how far the nearest point is from the middle between first and second places (..., dim).

    If that is half of their distance, the ball between them is empty: they are neighbors in the Gabriel graph.

    Source: K. R. Gabriel and R. R. Sokal, "A new statistical approach to geographic variation analysis", 1969.
    """
    return pairwise_distances(torch.lerp(first, second, 0.5), points).amin(-1)


def is_inside(points: Tensor, place: Tensor) -> bool:
    """Return whether a place (dim,) lies in the convex hull of points (m, dim)."""
    # a convex combination: non-negative weights whose sum is 1
    matrix = torch.cat([points, torch.ones_like(points[:, :1])], dim=1).T.numpy()
    _, distance = nnls(matrix, np.append(place.numpy(), 1.0))
    return distance <= 1e-7
