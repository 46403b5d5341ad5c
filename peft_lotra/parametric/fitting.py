# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One fit of a family: members at given parameters, or where the predictions in a range are worst."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from .choice import RESOLVED, WORSE, blended, candidates, greedy_batch, next_wave, skeleton
from .members import Failure, Member, Point, Problem, argument, fit_all, write
from .path import Path
from .report import FamilyReport
from .storage import RunFolder


EMPTY: Mapping[Point, np.ndarray] = MappingProxyType({})


class Fitting:
    """One call of `ParametricAdapter.fit`, which adds members to a path.

    Args:
        model: The model whose trainable parameters are the coordinates of a member. It is written to.
        problem: What members are fitted to.
        path: The members.
        executor: Where they are fitted, in this process without one.
        run: The folder that keeps them.
        known: The members that the folder has, by parameter and the number of fits at it before.
        progress: Whether to show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        path: Path,
        executor: Executor | None,
        run: RunFolder | None,
        known: dict[tuple[Point, int], Member],
        progress: bool,
    ) -> None:
        from tqdm import tqdm

        self.model, self.problem, self.path = model, problem, path
        self.executor, self.run, self.known = executor, run, known
        self.bar = tqdm(unit="member", desc="ParametricAdapter", disable=not progress)
        self.new: dict[Point, Member] = {}
        self.fits: Counter[Point] = Counter()
        self.failed: dict[float | Point, str] = {}
        self.largest = math.nan  # of the indicators in a range, as a share of their bounds

    def walk(self, points: Sequence[Point]) -> None:
        """Fits members at all points, wave after wave."""
        path = self.path
        fitted = {member.parameter for member in path.members}
        pending = [point for point in sorted(points) if point not in fitted]
        while pending:
            start = 0 if path.members else self._first(pending)
            pending = [point for point in pending if argument(point) not in self.failed]
            if not pending:
                return
            wave = [
                pending[index] for index in next_wave(path.scale(pending), path.places, min(start, len(pending) - 1))
            ]
            self._fit(wave)
            pending = [point for point in pending if point not in wave]

    def _first(self, pending: list[Point]) -> int:
        """The point at which the base itself has the least loss, or the middle one, without those that fail."""
        zero = np.zeros(self.path.size)
        indicators = [self._indicator(point, zero) for point in pending]
        places = self.path.scale(pending)
        distances = (places - places.mean(0)).norm(dim=1).tolist()
        working = [index for index, point in enumerate(pending) if argument(point) not in self.failed]
        if not working:
            return 0
        key = [(i if math.isfinite(i) else math.inf, d) for i, d in zip(indicators, distances, strict=True)]
        return working.index(min(working, key=lambda index: key[index]))

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
        path, predicted = self.path, self.path.vector_at(point)
        if not path.members or (path.is_inside(point) and self.problem.train is None):
            return predicted
        closest = path.nearest(point).vector
        return predicted if self._indicator(point, predicted) < self._indicator(point, closest) else closest

    def _fit(self, points: Sequence[Point], starts: Mapping[Point, np.ndarray] = EMPTY) -> int:
        """Fits members at these points, or takes those of the folder; returns how many."""
        names = {point: (point, self.fits[point]) for point in points}
        self.fits.update(list(names))
        results = [self.known[name] for name in names.values() if name in self.known]
        jobs = [(p, starts[p] if p in starts else self._start(p)) for p in points if names[p] not in self.known]
        jobs = [job for job in jobs if argument(job[0]) not in self.failed]
        for result in fit_all(self.model, self.problem, jobs, self.executor):
            if isinstance(result, Failure):
                self.failed[argument(result.parameter)] = result.error
                continue
            if self.run is not None:
                self.run.add(result, names[result.parameter][1])
            results.append(result)
            self.bar.update()
        self.new |= {member.parameter: member for member in results}
        self.path.add(results)
        return len(results)

    def search(self, dim: int, tolerance: float | None, most: int) -> None:
        """Fits members that span the range, and then adds some where predictions are worst, until all are good.

        Without a tolerance, indicators are compared with those of fitted members nearby. What counts is then what a
        new member gained: where that is little, the parameters around it, up to the next members, are resolved.
        """
        self.walk(self.path.scale.inverse(skeleton(dim, most)))
        places, path = candidates(dim), self.path
        points = path.scale.inverse(places)
        resolved = torch.zeros(len(points), dtype=torch.bool, device="cpu")
        while path.members:
            self._mend()
            indicators = [self._indicator(point, path.vector_at(point)) for point in points]
            failed = torch.tensor([argument(point) in self.failed for point in points], device="cpu")
            fitted = torch.tensor([member.indicator for member in path.members], device="cpu")
            bounds = (
                torch.full((len(points),), tolerance, device="cpu")
                if tolerance
                else blended(places, path.places, fitted)
            )
            shares = torch.tensor(indicators, device="cpu").nan_to_num(math.inf) / bounds
            shares[resolved | failed] = 0.0
            self.largest = shares.max().item()
            chosen = greedy_batch(places, shares, path.places, 1.0 if tolerance else WORSE)
            chosen = chosen[: max(most - len(path.members), 0)]
            before = path.places
            if not self._fit([points[index] for index in chosen]):
                return
            for index in chosen if tolerance is None else ():
                gained = [m.predicted / m.indicator for m in path.members if m.parameter == points[index]]
                if gained and gained[0] <= RESOLVED:
                    radius = (before - places[index]).norm(dim=1).min()
                    resolved |= (places - places[index]).norm(dim=1) <= radius * (1 + 1e-9)

    def _mend(self) -> None:
        """Fits members again, once, that are worse than what the others predict in their places.

        Those are members that the walk had to start from far away.
        """
        path, starts = self.path, {}
        for member in path.members if len(path.members) > 2 else ():
            if self.fits[member.parameter] == 1:
                start = path.vector_at(member.parameter, without=member.parameter)
                if self._indicator(member.parameter, start) < member.indicator:
                    starts[member.parameter] = start
        self._fit(list(starts), starts)

    def report(self) -> FamilyReport:
        """The members that were added.

        Raises:
            RuntimeError: No member was fitted.
        """
        self.bar.close()
        if self.failed:
            lines = "\n  ".join(f"{parameter}: {error}" for parameter, error in self.failed.items())
            message = f"{len(self.failed)} parameters were not fitted, since functions failed there:\n  {lines}"
            if not self.path.members:
                raise RuntimeError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return FamilyReport(self.new.values(), self.failed, self.largest, self.path.size)
