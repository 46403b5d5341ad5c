# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One fit of a family: members at given parameters, or where the predictions in a range are worst."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .interpolation import MemberSpace
from .members import Member, Point, Problem, argument, fit_all, write
from .report import FamilyReport
from .sampling_plan import candidates, greedy_batch, nearby_means, next_wave, skeleton
from .storage import KnownMembers


WORSE = 1.1  # an indicator is bad above this share of those of members nearby
RESOLVED = 1.2  # the parameters around a member are resolved if it brought the indicator down by this factor at most


@dataclass
class Fitting:
    """One call of `ParametricAdapter.fit`, which adds members to a space.

    Attributes:
        model: The model whose trainable parameters are the coordinates of a member. It is written to.
        problem: The functions that members are fitted to.
        space: The members.
        executor: The executor that fits them; None for this process.
        known: The members that were fitted before, by parameter and the number of fits there.
        bar: The progress bar.
        new: The members that were added.
        fits: The number of fits at each parameter.
        failed: The errors at parameters.
        largest: The largest indicator in a range, as a share of its bound.
    """

    model: nn.Module
    problem: Problem
    space: MemberSpace
    executor: Executor | None
    known: KnownMembers | dict[tuple[Point, int], Member]
    bar: Any
    new: dict[Point, Member] = field(default_factory=dict)
    fits: Counter[Point] = field(default_factory=Counter)
    failed: dict[float | Point, str] = field(default_factory=dict)
    largest: float = math.nan

    def walk(self, points: Sequence[Point]) -> None:
        """Fits members at all points, wave after wave."""
        fitted = {member.parameter for member in self.space.members}
        pending = [point for point in sorted(points) if point not in fitted]
        while pending := [point for point in pending if argument(point) not in self.failed]:
            start = 0 if self.space.members else self._first(pending)
            wave = next_wave(self.space.places_of(pending), self.space.places, start)
            wave = [pending[index] for index in wave]
            self._fit(dict.fromkeys(wave))
            pending = [point for point in pending if point not in wave]

    def _first(self, pending: list[Point]) -> int:
        """The index of the point at which the base itself has the least loss; among equals, nearest to the middle."""
        losses = [self._indicator(point, np.zeros(self.space.size)) for point in pending]
        places = self.space.places_of(pending)
        distances = (places - places.mean(0)).norm(dim=1).tolist()
        keys = [(i if math.isfinite(i) else math.inf, d) for i, d in zip(losses, distances, strict=True)]
        return keys.index(min(keys))

    def _indicator(self, point: Point, vector: np.ndarray) -> float:
        """The indicator of a prediction, NaN where a function of the user fails."""
        try:
            write(self.model, vector)
            return self.problem.indicator(self.model, point)
        except Exception as error:
            self.failed[argument(point)] = f"{type(error).__name__}: {error}"
            return math.nan

    def _start(self, point: Point) -> np.ndarray:
        """The prediction at a point; outside of the members, the nearest member if that has the smaller indicator."""
        space, predicted = self.space, self.space.vector_at(point)
        if not space.members or (space.is_inside(point) and self.problem.train is None):
            return predicted
        closest = space.nearest(point).vector
        return predicted if self._indicator(point, predicted) < self._indicator(point, closest) else closest

    def _fit(self, starts: Mapping[Point, np.ndarray | None]) -> int:
        """Fits members from these starts, by default the predictions; returns how many there are."""
        jobs: dict[Point, np.ndarray] = {}
        members: dict[Point, Member] = {}
        for point, start in starts.items():
            if (known := self.known.get((point, self.fits[point]))) is not None:
                members[point] = known
            else:
                jobs[point] = self._start(point) if start is None else start
        jobs = {point: start for point, start in jobs.items() if argument(point) not in self.failed}
        for point, result in fit_all(self.model, self.problem, jobs, self.executor):
            if isinstance(result, str):
                self.failed[argument(point)] = result
            else:
                members[point] = self.known[point, self.fits[point]] = result
                self.bar.update()
        self.fits.update(list(starts))
        self.new |= members
        self.space.add(members.values())
        return len(members)

    def search(self, dim: int, tolerance: float | None, most: int) -> None:
        """Fits members that span the range, and then adds some where predictions are worst, until all are good.

        Without a tolerance, indicators are compared with those of fitted members nearby, and a member that gained
        little resolves the parameters around it, up to the next members.
        """
        space, places = self.space, candidates(dim)
        points = space.points_at(places)
        self.walk(space.points_at(skeleton(dim, most)))
        resolved = torch.zeros(len(points), dtype=torch.bool, device="cpu")
        while space.members:
            self._refit()
            indicators = [self._indicator(point, space.vector_at(point)) for point in points]
            failed = torch.tensor([argument(point) in self.failed for point in points], device="cpu")
            fitted = torch.tensor([member.indicator for member in space.members], device="cpu")
            bounds = tolerance or nearby_means(places, space.places, fitted)
            shares = torch.tensor(indicators, device="cpu").nan_to_num(math.inf) / bounds
            shares[resolved | failed] = 0.0
            self.largest = shares.max().item()
            chosen = greedy_batch(places, shares, space.places, 1.0 if tolerance else WORSE)
            chosen = chosen[: max(most - len(space.members), 0)]
            before = space.places
            if not self._fit({points[index]: None for index in chosen}):
                return
            for index in chosen if tolerance is None else ():
                member = self.new.get(points[index])
                if member is not None and member.predicted <= RESOLVED * member.indicator:
                    radius = (before - places[index]).norm(dim=1).min()
                    resolved |= (places - places[index]).norm(dim=1) <= radius * (1 + 1e-9)

    def _refit(self) -> None:
        """Fits members again, once, whose indicator is larger than that of what the others predict in their places.

        The walk had started them from far away.
        """
        starts = {}
        for member in self.space.members if len(self.space.members) > 2 else ():
            if self.fits[member.parameter] == 1:
                start = self.space.vector_at(member.parameter, without=member.parameter)
                if self._indicator(member.parameter, start) < member.indicator:
                    starts[member.parameter] = start
        self._fit(starts)

    def report(self) -> FamilyReport:
        """The members that were added; a RuntimeError if the family has none."""
        self.bar.close()
        if self.failed:
            lines = "\n  ".join(f"{parameter}: {error}" for parameter, error in self.failed.items())
            message = f"{len(self.failed)} parameters were not fitted, since functions failed there:\n  {lines}"
            if not self.space.members:
                raise RuntimeError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return FamilyReport(self.new.values(), self.failed, self.largest, self.space.size)
