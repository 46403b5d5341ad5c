# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One fit of a family: members at given parameters, or where the predictions in a range are worst."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .interpolation import FamilyReport, Member, MemberSpace, Point, pairwise_distances
from .members import Job, Problem, argument, attempt, write


GAIN = 1.2  # a prediction is good up to this share of the indicators of members: a fit would gain little
FAR = 10.0  # a member failed above this share of the least indicator of its neighbors
NEAR = 0.02  # a member is too near to another one below this share of that one's distance to a third
STRIDES = 4  # of a second fit, from a neighbor
STRIDE = 1 / 8  # of the range: how far a member may start from the nearest one


@dataclass
class Fitting:
    """One call of `ParametricAdapter.fit`, which adds members to a space.

    Attributes:
        model: The model whose trainable parameters are the coordinates of a member. It is written to.
        problem: The functions that members are fitted to.
        space: The members.
        max_steps: The most steps of a member.
        executor: The executor that fits them; None for this process.
        bar: The progress bar.
        new: The members that were added.
        refitted: The parameters of members that were fitted again.
        failed: The errors at parameters.
        largest: The largest indicator in a range, as a share of its bound.
    """

    model: nn.Module
    problem: Problem
    space: MemberSpace
    max_steps: int
    executor: Executor | None
    bar: Any
    new: dict[Point, Member] = field(default_factory=dict)
    refitted: set[Point] = field(default_factory=set)
    failed: dict[float | Point, str] = field(default_factory=dict)
    largest: float = math.nan

    def walk(self, points: Sequence[Point]) -> None:
        """Fit members at all points, wave after wave."""
        space = self.space
        self._refuse_near(points)
        while True:
            done = {argument(member.parameter) for member in space.members} | self.failed.keys()
            pending = [point for point in sorted(points) if argument(point) not in done]
            if not pending:
                break
            start = 0 if space.members else self._first(pending)
            wave = next_wave(space.positions_of(pending), space.positions, start)
            self._fit([pending[index] for index in wave])
        self._fit_again()

    def _refuse_near(self, points: Sequence[Point]) -> None:
        """Refuse points that are far nearer to another one than that one is to a third.

        Members differ by how far they were trained. An interpolation through two near ones magnifies the difference.
        """
        fitted = [member.parameter for member in self.space.members]
        new = sorted(set(points) - set(fitted))
        together = [*fitted, *new]
        if len(together) < 3:
            return
        positions = self.space.positions_of(together)
        distances = pairwise_distances(positions, positions).fill_diagonal_(math.inf)
        for index, point in enumerate(new, len(fitted)):
            distance, nearest = distances[index].min(0)
            to_third = distances[nearest].sort().values[1]
            if distance < NEAR * to_third < math.inf:
                self.failed[argument(point)] = (
                    f"it is too near to {argument(together[nearest])}, whose member serves both: between two near "
                    "members, interpolation is wrong elsewhere"
                )
                distances[index] = math.inf
                distances[:, index] = math.inf

    def _first(self, pending: list[Point]) -> int:
        """Return the index of the point with the least loss of the base; of equal ones, the middle one."""
        base = np.zeros(self.space.size)
        losses = np.array([self._indicator(point, base) for point in pending])
        from_middle = abs(np.arange(len(pending)) - len(pending) // 2)
        order = np.lexsort([from_middle, losses])  # NaN comes last
        return int(order[0])

    def _indicator(self, point: Point, vector: np.ndarray) -> float:
        """Return the indicator of a prediction, NaN where a function of the user fails."""
        try:
            write(self.model, vector)
            return self.problem.indicator(self.model, point)
        except Exception as error:
            self.failed[argument(point)] = f"{type(error).__name__}: {error}"
            return math.nan

    def _fit(self, points: Sequence[Point]) -> None:
        """Fit members from the predictions there; outside of the members, from the nearest if that is better."""
        space = self.space
        jobs = {}
        for point in points:
            start = space.vector_at(point)
            if space.members and (self.problem.train is not None or not space.is_inside(point)):
                index = space.nearest(point)[0]
                closest = space.members[index].vector
                if not self._indicator(point, start) < self._indicator(point, closest):
                    start = closest
            jobs[point] = [point], start, self.max_steps
        self._run(jobs)

    def _run(self, jobs: Mapping[Point, Job]) -> None:
        """Add the members of jobs, unless there are better ones."""
        pending = {point: job for point, job in jobs.items() if argument(point) not in self.failed}
        run_all = map if self.executor is None else self.executor.map
        results = run_all(partial(attempt, self.model, self.problem), list(pending.values()))
        for point, result in zip(pending, results, strict=True):
            if isinstance(result, str):
                self.failed[argument(point)] = result
                continue
            self.bar.update()
            if point not in self.new or result.indicator < self.new[point].indicator:
                self.new[point] = result
        self.space.add(self.new.values())

    def _find_bad(self) -> Iterator[tuple[Member, Member]]:
        """Yield new members that are far worse than a neighbor, with the best neighbor."""
        members = self.space.members
        if len(members) < 3:
            return
        for member in self.new.values():
            indices = self.space.nearest(member.parameter)
            neighbors = [members[index] for index in indices[1:]]
            best = min(neighbors, key=lambda neighbor: neighbor.indicator)
            if member.indicator > FAR * best.indicator:
                yield member, best

    def _fit_again(self) -> None:
        """Fit bad members once more, from the best neighbor, with more steps and in smaller strides."""
        space = self.space
        jobs = {}
        for member, best in self._find_bad():
            point = member.parameter
            if point in self.refitted or self.problem.train is not None:
                continue
            start, end = space.positions_of([best.parameter, point])
            strides = grid(1, STRIDES)[1:-1]
            path = space.points_at(torch.lerp(start, end, strides))
            jobs[point] = [*path, point], best.vector, 2 * self.max_steps
        self.refitted |= jobs.keys()
        self._run(jobs)

    def search(self, dim: int, tolerance: float | None, most: int) -> None:
        """Fit members on a grid of the range, and then on finer and finer grids where predictions are bad."""
        space = self.space
        level = {1: 3, 2: 1}.get(dim, 0)
        while (2**level + 1) ** dim > most:
            level -= 1
        self.walk(space.points_at(grid(dim, 2**level)))
        while space.members:
            level += 1
            points, shares = self._rate_predictions(grid(dim, 2**level), tolerance)
            self.largest = float(shares.max())
            room = max(most - len(space.members), 0)
            worst = np.argsort(-shares, kind="stable")[:room]
            chosen = [points[index] for index in worst if shares[index] > 1]
            self._fit(chosen)
            self._fit_again()
            added = [self.new[point] for point in chosen if point in self.new]
            if not any(tolerance or member.predicted > GAIN * member.indicator for member in added):
                return

    def _rate_predictions(
        self,
        positions: Tensor,
        tolerance: float | None,
    ) -> tuple[list[Point], np.ndarray]:
        """Return the points at positions without a member, and their indicators as shares of the bound.

        The bound is the tolerance, or it follows from both nearest members.
        """
        space = self.space
        distances = torch.cdist(positions, space.positions)
        is_new = distances.amin(1) > 1e-9
        near = distances[is_new].argsort(stable=True)[:, :2].numpy()
        fitted = np.array([member.indicator for member in space.members])
        bounds = tolerance or GAIN * fitted[near].max(1)

        points = space.points_at(positions[is_new])
        indicators = [self._indicator(point, space.vector_at(point)) for point in points]
        shares = np.array(indicators) / bounds
        shares[np.isnan(shares)] = math.inf
        has_failed = [argument(point) in self.failed for point in points]
        shares[has_failed] = 0.0
        return points, shares

    def report(self) -> FamilyReport:
        """Return the members that were added; a RuntimeError if the family has none."""
        self.bar.close()
        for member, best in self._find_bad():
            share = member.indicator / max(best.indicator, 1e-300)
            self.failed[argument(member.parameter)] = (
                f"the residual stays at {member.indicator:.2g}, {share:.0f} times a neighbor's: fit members nearby, "
                "or take higher `ranks`"
            )
        if self.failed:
            lines = "\n  ".join(f"{parameter}: {error}" for parameter, error in self.failed.items())
            message = f"{len(self.failed)} parameters failed:\n  {lines}"
            if not self.space.members:
                raise RuntimeError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return FamilyReport(self.new.values(), self.failed, self.largest, self.space.size)


def next_wave(pending: Tensor, members: Tensor, start: int) -> list[int]:
    """Return the indices of the `pending` positions (n, dim) that are fitted together next.

    The walk leads outward from `start` in strides. The positions between members then follow in one wave.
    """
    if not len(members):
        return [start]
    distances = torch.cdist(pending, members).amin(dim=1)
    if len(members) > 2 and distances.max() <= STRIDE * (1 + 1e-9):
        return list(range(len(pending)))
    limit = max(STRIDE, distances.min().item()) * (1 + 1e-9)
    wave = []
    # the farthest first, none nearer to another than the limit
    order = distances.round(decimals=9).argsort(descending=True, stable=True)
    for index in order.tolist():
        if distances[index] <= limit:
            gaps = (pending[wave] - pending[index]).norm(dim=1)
            if (gaps >= limit * (1 - 1e-6)).all():
                wave.append(index)
    return wave


def grid(dim: int, intervals: int) -> Tensor:
    """Return the positions (n, dim) of a grid of the unit cube with so many intervals along each side."""
    line = torch.linspace(0, 1, intervals + 1, dtype=torch.float64, device="cpu")
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
