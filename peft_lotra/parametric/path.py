# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fitted members of a family as points of one linear space, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..modules.checks import as_number
from .interpolation import Scale, is_inside, nearest, weights_at
from .members import Member, Point, argument


class Path:
    """The members, and the interpolation of their coordinates.

    Args:
        size: The number of coordinates of a member.
        log: Whether a parameter is scaled by its logarithm; one flag for all, or one for each.
    """

    def __init__(self, size: int, log: bool | Sequence[bool]) -> None:
        self.size = size
        flags = list(log) if isinstance(log, Sequence) else [log]
        if not flags or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"`log` is {log!r:.100}, but must be True or False, or a list of these, one a parameter.")
        self.log: bool | list[bool] = log if isinstance(log, bool) else flags
        self.members: list[Member] = []
        self.scale = Scale([0.0], [1.0], [False])
        self.places = torch.empty(0, 1, device="cpu")  # the coordinates of the members in the range

    @property
    def vectors(self) -> np.ndarray:
        """(members, P)."""
        return np.stack([member.vector for member in self.members])

    def point(self, parameter: Any, dim: int | None = None) -> Point:
        """A parameter as a tuple of numbers; a ValueError if it is none, or of another dimension."""
        try:
            point = tuple(map(as_number, (parameter,) if np.ndim(parameter) == 0 else tuple(parameter)))
        except (TypeError, ValueError, RuntimeError):  # a ragged list, a tensor on the meta device
            point = ()
        known = dim or (None if isinstance(self.log, bool) else len(self.log))
        if not point or any(map(math.isnan, point)) or len(point) != (known or len(point)):
            raise ValueError(f"The parameter {parameter!r:.100} must be {known or 'one or more'} finite numbers.")
        if any(flag and value <= 0 for flag, value in zip(self._flags(len(point)), point, strict=True)):
            raise ValueError(f"The parameter {parameter!r} must be above 0, since the family is in its logarithm.")
        return point

    def distinct(self, parameters: Iterable[Any]) -> list[Point]:
        """Parameters as points of one dimension, that of the members, each once."""
        points = list(dict.fromkeys(self.point(parameter) for parameter in parameters))
        dims = sorted({len(point) for point in [*points, *(member.parameter for member in self.members)]})
        if not points or len(dims) > 1:
            raise ValueError(f"The parameters must be one or more, of one dimension, not of {dims}.")
        return points

    def _flags(self, dim: int) -> list[bool]:
        return [self.log] * dim if isinstance(self.log, bool) else self.log

    def spread(self, points: Sequence[Point]) -> None:
        """Scales parameters by the range of these points and the members."""
        array = np.array([*points, *(member.parameter for member in self.members)])
        dim = array.shape[1]
        self.scale = Scale(array.min(0).tolist(), array.max(0).tolist(), self._flags(dim))
        self.places = torch.empty(0, dim, dtype=torch.float64, device="cpu")
        self.add(())

    def add(self, members: Iterable[Member]) -> None:
        """Adds members; those of known parameters are replaced."""
        merged = {member.parameter: member for member in [*self.members, *members]}
        self.members = [merged[point] for point in sorted(merged)]
        if self.members:
            self.places = self.scale([member.parameter for member in self.members])

    def is_inside(self, point: Point) -> bool:
        """Whether a parameter lies in the convex hull of the members."""
        return is_inside(self.places, self.scale(point))

    def nearest(self, point: Point) -> Member:
        """The member whose parameter is nearest."""
        return self.members[nearest(self.places, self.scale(point))[0]]

    def ranges(self) -> list[str]:
        """The range of each parameter, as text."""
        axes = zip(*(member.parameter for member in self.members), strict=True)
        return [f"{min(axis):g} to {max(axis):g}" for axis in axes]

    def vector_at(self, point: Point, without: Point | None = None) -> np.ndarray:
        """The coordinates (P,) at a parameter, interpolated; outside of the members extrapolated from the nearest.

        The member at `without` is left out.
        """
        used = [index for index, member in enumerate(self.members) if member.parameter != without]
        if not used:
            return np.zeros(self.size)
        at, places = self.scale(point), self.places[used]
        if not is_inside(places, at):
            used = [used[index] for index in nearest(places, at)]
        weights = weights_at(self.places[used], at).numpy()
        return np.einsum("m,mp->p", weights, np.stack([self.members[index].vector for index in used]))

    @property
    def parameters(self) -> list[float | Point]:
        """The parameters as functions of the user get them."""
        return [argument(member.parameter) for member in self.members]
