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
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .interpolation import FamilyReport, Member, MemberSpace, Point
from .members import Job, MissingReturnError, Problem, argument, attempt, write


GAIN = 1.2  # a prediction is good up to this share of the indicators of members: a fit would gain little
FAR = 10.0  # a member failed above this share of the least indicator of its neighbors
STRIDES = 4  # of a second fit, from a neighbor
STRIDE = 1 / 8  # of the range: how far a member may start from the nearest one


@dataclass
class Fitting:
    """One call of `ParametricAdapter.fit`, which adds members to a space.

    Attributes:
        model: The model whose trainable parameters are the coordinates of a member. It is written to.
        problem: The functions that members are fitted to.
        space: The members.
        executor: The executor that fits them; None for this process.
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
            wave = [pending[i] for i in next_wave(self.space.places_of(pending), self.space.places, start)]
            self._fit(wave)
            pending = [point for point in pending if point not in wave]
        self._fit_again()

    def _first(self, pending: list[Point]) -> int:
        """The index of the point at which the base itself has the least loss; among equals, nearest to the middle."""
        losses = [self._indicator(point, np.zeros(self.space.size)) for point in pending]
        middle = len(pending) // 2
        return min(range(len(pending)), key=lambda i: (np.nan_to_num(losses[i], nan=math.inf), abs(i - middle)))

    def _indicator(self, point: Point, vector: np.ndarray) -> float:
        """The indicator of a prediction, NaN where a function of the user fails."""
        try:
            write(self.model, vector)
            return self.problem.indicator(self.model, point)
        except MissingReturnError:  # it would at every parameter
            raise
        except Exception as error:
            self.failed[argument(point)] = f"{type(error).__name__}: {error}"
            return math.nan

    def _start(self, point: Point) -> np.ndarray:
        """The prediction at a point; outside of the members, the nearest member if that has the smaller indicator."""
        space, predicted = self.space, self.space.vector_at(point)
        if not space.members or (space.is_inside(point) and self.problem.train is None):
            return predicted
        closest = space.nearest(point)[0].vector
        return predicted if self._indicator(point, predicted) < self._indicator(point, closest) else closest

    def _fit(self, points: Sequence[Point]) -> None:
        """Fits members from the predictions there."""
        self._run({point: ([point], self._start(point), self.problem.max_steps) for point in points})

    def _run(self, jobs: Mapping[Point, Job]) -> None:
        """Adds the members of jobs, unless there are better ones."""
        found: dict[Point, Member] = {}
        jobs = {point: job for point, job in jobs.items() if argument(point) not in self.failed}
        fits = map if self.executor is None else self.executor.map
        results = fits(partial(attempt, self.model, self.problem), jobs.values())
        for point, result in zip(jobs, results, strict=True):
            if isinstance(result, str):
                self.failed[argument(point)] = result
            else:
                found[point] = result
                self.bar.update()
        self.fits.update(found.keys())
        better = {p: m for p, m in found.items() if p not in self.new or m.indicator < self.new[p].indicator}
        self.new |= better
        self.space.add(better.values())

    def _fit_again(self) -> None:
        """Fits members again, once, that are worse than the prediction of the others in their place, from there, or
        far worse than a neighbor, with more steps and in smaller strides from that one."""
        jobs: dict[Point, Job] = {}
        for member in self.space.members if len(self.space.members) > 2 else ():
            point, best = member.parameter, self._best_neighbor(member)
            if self.fits[point] != 1 or self.problem.train is not None:
                continue
            predicted = self.space.vector_at(point, without=point)
            if member.indicator > FAR * best.indicator:
                ends = self.space.places_of([best.parameter, point])
                shares = torch.linspace(0, 1, STRIDES + 1, dtype=torch.float64, device="cpu")[1:-1, None]
                path = [*self.space.points_at(torch.lerp(ends[0], ends[1], shares)), point]
                jobs[point] = path, best.vector, 2 * self.problem.max_steps
            elif self._indicator(point, predicted) < member.indicator:
                jobs[point] = [point], predicted, self.problem.max_steps
        self._run(jobs)

    def _best_neighbor(self, member: Member) -> Member:
        """The member of the least indicator among the nearest, two with one parameter."""
        return min(self.space.nearest(member.parameter)[1:], key=lambda other: other.indicator)

    def search(self, dim: int, tolerance: float | None, most: int) -> None:
        """Fits members on a grid of the range, and then those of finer and finer grids where predictions are bad."""
        space, level = self.space, {1: 3, 2: 1}.get(dim, 0)
        while (2**level + 1) ** dim > most:
            level -= 1
        self.walk(space.points_at(grid(dim, level)))
        while space.members:
            level += 1
            places = grid(dim, level)
            places = places[torch.cdist(places, space.places).amin(1) > 1e-9]
            points = space.points_at(places)
            fitted = torch.tensor([member.indicator for member in space.members], dtype=torch.float64, device="cpu")
            near = torch.cdist(places, space.places).topk(min(2, len(fitted)), largest=False).indices
            bounds = tolerance or GAIN * fitted[near].amax(1)
            predicted = [self._indicator(point, space.vector_at(point)) for point in points]
            shares = torch.tensor(predicted, dtype=torch.float64, device="cpu").nan_to_num(math.inf) / bounds
            shares[[argument(point) in self.failed for point in points]] = 0.0
            self.largest = shares.max().item()
            worst = shares.argsort(descending=True, stable=True)[: max(most - len(space.members), 0)]
            chosen = [points[index] for index in worst.tolist() if shares[index] > 1]
            self._fit(chosen)
            self._fit_again()
            new = [self.new[point] for point in chosen if point in self.new]
            if not any(tolerance or member.predicted > GAIN * member.indicator for member in new):
                return

    def report(self) -> FamilyReport:
        """The members that were added; a RuntimeError if the family has none."""
        self.bar.close()
        for member in self.new.values() if len(self.space.members) > 2 else ():
            share = member.indicator / max(self._best_neighbor(member).indicator, 1e-300)
            if share > FAR:
                text = f"the residual stays at {member.indicator:.2g}, {share:.0f} times that of a neighbor"
                self.failed[argument(member.parameter)] = f"{text}: fit members nearby, or take higher `ranks`"
        if self.failed:
            lines = "\n  ".join(f"{parameter}: {error}" for parameter, error in self.failed.items())
            message = f"{len(self.failed)} parameters failed:\n  {lines}"
            if not self.space.members:
                raise RuntimeError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return FamilyReport(self.new.values(), self.failed, self.largest, self.space.size)


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
    wave: list[int] = []  # the farthest first, none nearer to another than the limit
    for index in sorted(range(len(pending)), key=lambda i: (-round(distances[i].item(), 9), i)):
        apart = all((pending[index] - pending[other]).norm() >= limit * (1 - 1e-6) for other in wave)
        if distances[index] <= limit and apart:
            wave.append(index)
    return wave


def grid(dim: int, level: int) -> Tensor:
    """The places (n, dim) of a grid of the unit cube with 2^level intervals along each side."""
    line = torch.linspace(0, 1, 2**level + 1, dtype=torch.float64, device="cpu")
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
