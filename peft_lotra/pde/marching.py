# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Solutions of polynomials: on the whole box, or marched in time with control of the error."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import check_residuals
from .boxes import box_points, side_points
from .constraints import HardConstraint
from .diagnostics import list_functions
from .point_cache import PointCache, current_cache
from .polynomials import BoxPolynomials, coefficients_of, grid_points, new_polynomials
from .solution import Phase, Solution
from .windows import Windows, rows_in_window


if TYPE_CHECKING:
    from .race import Starts


# The number of functions of a coordinate
FIRST_COUNTS = {1: 12, 2: 8, 3: 6, 4: 4, 5: 3}  # of the first level, by the dimension of the box
# Of the time in a window: the first and the largest number, on a line and in more dimensions
IN_TIME = 12, 40
IN_TIME_AND_SPACE = 6, 14
GROWTH = 1.5  # from level to level
MOST = 3000  # products of functions of all coordinates: the normal equations of a step take a few seconds
RELEVANT = 0.1  # of the largest coefficients of a coordinate's highest functions: with fewer there, it has enough

POINTS = 1.25  # of the grid along each coordinate, for each function
MANY_POINTS = 4.0  # the same for a correction, as the residual of a network is rough
HELD_POINTS = 500  # that are not on the grid
STEPS = 25  # of a level, at most
SLOW = 0.3  # of the loss: a step that lowers it by less is the last one of its level
DAMPING = 1e-12
FLOOR = 1e-15
ROUNDING = 1e-15
UNSOLVED = 1e-5  # of the first residual: what is larger, and does not fall, has no known error
FALLEN = 0.9  # of the residual of a network, at most, for a correction that tells its error
AGREEMENT = 0.3  # the difference of two corrections that tell the error

SOLVED = 1e-5  # the error of a solution after which no other one is tried

# Shares of the budget
WHOLE = 0.15  # for the whole box, if there is a time
ALONE = 0.4  # the same, if there is none
TRAINED = 0.9  # for all but the estimate of the error
ESTIMATE = 0.25  # beyond the steps of the caller, for the estimate

EXACT = 1e-9  # the error after which no level follows
TOLERANCES = 1e-4, 1e-6, 1e-8  # of the error in a window, march after march
FIRST_WINDOWS = 8  # into which the time is divided at first
LARGEST_GAP = 0.1  # of the time, between the points of a term that holds all the time
LEAST_WINDOW = 1e-3  # of the time: a march with a shorter window is given up
LENGTHENED = 1.5  # after a window whose error is below EASY of the tolerance
EASY = 0.1
HASTE = 1.5  # a march that would need so many times what is left of the budget is given up
LATE = 0.3  # of the time: a later march is given up as soon as it would need more than what is left
ACCUMULATED = 3.0  # the error of a march, as a multiple of the sum of its windows' errors


@dataclass
class Level:
    """A network of polynomials, and how well it solves the equation.

    Attributes:
        model: The network with the conditions, and the windows before it.
        network: The network.
        residual: The root mean square of the residual at held-out points.
        values: Of the model at these points.
        error: The estimate of the error, in proportion to the values.
        is_converged: Whether no step lowers the residual on the grid by much.
    """

    model: HardConstraint
    network: Any
    residual: float
    values: Tensor
    is_converged: bool
    error: float = math.inf


@dataclass
class Candidate:
    """A solution with the estimate of its relative L2 error, and the root mean square of its residual."""

    model: HardConstraint
    error: float
    residual: float

    def __post_init__(self) -> None:
        for module in self.model.modules():
            if isinstance(module, BoxPolynomials):
                module.has_warned = False


@dataclass
class Polynomials:
    """The search for a solution of polynomials, with what is left of the budget.

    Attributes:
        starts: What all starts of a `solve` share.
        model: The best solution so far, which the caller sees during a march.
        size: The root mean square of the solution so far, to which errors relate.
    """

    starts: Starts
    size: float = 0.0
    steps: int = 0
    record: LevenbergMarquardtStep | None = None

    def __post_init__(self) -> None:
        self.model = self.starts.result.model

    def solve(self) -> Candidate | None:
        """Return the best solution, on the whole box or marched in time; None without any whose error is known."""
        result = self.starts.result
        dimensions = len(result.low)
        if dimensions not in FIRST_COUNTS:
            return None
        instant, _ = find_time(self.starts)
        can_march = instant is not None and all(_is_causal(term, instant, result) for term in self.starts.terms)
        share = WHOLE if can_march else ALONE
        best = self._solve_whole(share)
        if not can_march or (best is not None and best.error <= SOLVED):
            return best

        first: Candidate | None = None
        for tolerance in TOLERANCES:
            marched = self._march(tolerance, TRAINED)
            if marched is None:
                break
            if first is not None:
                # the change is the error of the first march, and falls like the residual
                change = self.difference(first.model, marched.model)
                fall = marched.residual / max(first.residual, 1e-300)
                marched.error = change * min(fall, 1.0) + ROUNDING
            if best is None or marched.error < best.error:
                best = marched
            first = marched
            if best.error <= SOLVED:
                break
        return best

    def estimate_error(self, model: HardConstraint) -> float:
        """Return the relative L2 error of a model, by the polynomials that correct it; NaN if there are none.

        For a linear equation, the correction that lowers the residual to nothing is the error.
        """
        starts = self.starts
        result = starts.result
        if len(result.low) not in FIRST_COUNTS:
            return math.nan
        frozen = _freeze(model)

        def constrain(network: nn.Module) -> HardConstraint:
            return HardConstraint(network, starts.distance, frozen)

        problem = _Problem(self, result.low, result.high, constrain, is_correction=True)
        of_model, values = problem.evaluate(frozen)
        level = None
        error = math.nan
        until = 1.0 if starts.budget.is_timed else 1.0 + ESTIMATE
        while starts.budget.allows_step(until):
            level = problem.next_level(level, until)
            if level is None:
                break
            before = error
            fall = level.residual / of_model
            change = _rms(level.values - values) / max(_rms(level.values), 1e-300)
            error = change if fall < FALLEN else math.nan
            # two corrections agree, and do not depend on the polynomials
            if abs(error - before) <= AGREEMENT * error:
                return error
        return math.nan

    def difference(self, model: nn.Module, other: nn.Module) -> float:
        """Return the relative L2 difference of two models."""
        result = self.starts.result
        x = box_points(result.low.tolist(), result.high.tolist(), 2 * HELD_POINTS, inside=result.inside, seed=1)
        with torch.no_grad():
            values = other(x)
            return _rms(model(x) - values) / max(_rms(values), 1e-300)

    def _solve_whole(self, share: float) -> Candidate | None:
        """Return the solution on the whole box, after as many levels as a share of the budget allows."""
        starts = self.starts
        result = starts.result

        def constrain(network: nn.Module) -> HardConstraint:
            return HardConstraint(network, starts.distance, starts.lift)

        problem = _Problem(self, result.low, result.high, constrain)
        begin = _Clock(self)
        best: Level | None = None
        level = None
        stalls = 0
        while starts.budget.allows_step(share):
            before = level
            level = problem.next_level(level, share)
            if level is None:
                break
            if best is None or level.error <= best.error:
                best = level
            if before is not None:
                stalls = stalls + 1 if level.residual > 0.9 * before.residual else 0
            if best.error <= EXACT or stalls == 2:
                break
        if best is None:
            return None
        self.model = best.model
        counts = " x ".join(map(str, best.network[0].counts))
        reason = "stalled" if starts.budget.allows_step(share) else "budget"
        if best.error <= SOLVED:
            reason = "solved"
        begin.add_phase(best.residual, reason, counts)
        if math.isinf(best.error):
            return None
        return Candidate(best.model, best.error, best.residual)

    def _march(self, tolerance: float, until: float) -> Candidate | None:
        """Solve in windows in time, one after another, each of a length at which its error is below the tolerance."""
        starts = self.starts
        result = starts.result
        instant, smoothness = find_time(starts)
        assert instant is not None
        start, stop = result.low[instant].item(), result.high[instant].item()
        width = (stop - start) / FIRST_WINDOWS
        networks: list[nn.Module] = []
        ends = [start]
        error = 0.0
        counts = None
        self.size = 0.0
        begin = _Clock(self)
        spent_before = starts.budget.spent()
        reason = "solved"
        squares = 0.0
        model = None
        while ends[-1] < stop:
            left = stop - ends[-1]
            width = left / math.ceil(0.999 * left / width)
            end = stop if width > 0.999 * left else ends[-1] + width
            level = self._solve_window(networks, [*ends, end], instant, smoothness, counts, tolerance, until)
            if level is not None and level.model.kan.looks_ahead:
                reason = "looks ahead"
                break
            if level is not None and level.error <= tolerance:
                model = level.model
                level.network.requires_grad_(False)
                networks.append(level.network)
                ends.append(end)
                error += level.error
                squares += level.residual**2
                counts = list(level.network[0].counts)
                # two levels below
                counts[instant] = math.ceil(counts[instant] / GROWTH**2)
                self.size = max(self.size, _rms(level.values))
                if level.error <= EASY * tolerance:
                    width *= LENGTHENED
            else:
                width /= 2
                if width < LEAST_WINDOW * (stop - start):
                    reason = "stalled"
                    break

            # whether the rest fits into what is left of the budget, if a first window takes no longer than until now
            spent = starts.budget.spent()
            done = max(ends[-1] - start, width) / (stop - start)
            needed = (spent - spent_before) * (1 - done) / done
            haste = HASTE if done < LATE else 1.0
            if needed > haste * (until - spent) or starts.budget.is_stopped:
                reason = "budget"
                break

        count = len(networks)
        name = f"{count} window{'s'[: count != 1]}"
        residual = math.sqrt(squares / max(count, 1))
        begin.add_phase(residual, reason, name, f"march to {ends[-1]:.4g}, within {tolerance:g}")
        if reason != "solved" or model is None:
            return None
        model.kan.activate(None)  # pyright: ignore[reportCallIssue]
        return Candidate(model, ACCUMULATED * error, residual)

    def _solve_window(
        self,
        networks: list[nn.Module],
        ends: list[float],
        instant: int,
        smoothness: int,
        counts: list[int] | None,
        tolerance: float,
        until: float,
    ) -> Level | None:
        """Return the solution in the last window, which continues the windows before."""
        starts = self.starts
        low, high = starts.result.low.clone(), starts.result.high.clone()
        low[instant], high[instant] = ends[-2:]

        def constrain(network: nn.Module) -> HardConstraint:
            windows = Windows([*networks, network], ends, instant, smoothness)
            windows.activate(len(networks))
            return HardConstraint(windows, starts.distance, starts.lift)

        coefficients = None
        if networks:
            # as at the end of the window before
            before = coefficients_of(networks[-1])  # pyright: ignore[reportArgumentType]
            coefficients = before.sum(1 + instant, keepdim=True)
        problem = _Problem(self, low, high, constrain, instant, counts, coefficients)
        level = None
        while True:
            following = problem.next_level(level, until)
            if following is None:
                return level
            level = following
            if level.error <= tolerance or not starts.budget.allows_step(until):
                return level


class _Problem:
    """The equation on a box, on grids that get finer from level to level.

    Args:
        search: The search that it is a part of.
        low, high: The ends of the box.
        constrain: Makes the model of a network.
        instant: The time coordinate of a window; None for the whole box.
        is_correction: Whether it corrects another solution, and the caller does not see its steps.
        counts: The number of functions of each coordinate on the first level.
        coefficients: Of the first level.
    """

    def __init__(
        self,
        search: Polynomials,
        low: Tensor,
        high: Tensor,
        constrain: Callable[[nn.Module], HardConstraint],
        instant: int | None = None,
        counts: Sequence[int] | None = None,
        coefficients: Tensor | None = None,
        is_correction: bool = False,
    ) -> None:
        starts = search.starts
        self.search = search
        self.starts = starts
        self.low, self.high = low, high
        self.constrain = constrain
        self.instant = instant
        self.is_correction = is_correction
        self.periodic = starts.features.periodic
        dimensions = len(low)
        self.in_time = IN_TIME if dimensions == 1 else IN_TIME_AND_SPACE
        first = [FIRST_COUNTS[dimensions]] * dimensions
        self.counts = self._round(counts or first)
        if instant is not None and counts is None:
            self.counts[instant], _ = self.in_time
        self.coefficients = coefficients
        self.held = box_points(low.tolist(), high.tolist(), HELD_POINTS, inside=starts.result.inside, seed=7)
        self.terms = starts.terms if instant is None else rows_in_window(starts.terms, low, high)

    def next_level(self, before: Level | None, until: float) -> Level | None:
        """Solve with more functions than before; None if there cannot be more, or the time is too short."""
        if before is not None:
            counts = self._enlarge(before.network)
            grows = math.prod(counts) / before.network[0].out_features
            if counts == before.network[0].counts or not self._has_time(grows, until):
                return None
            self.counts = counts
            self.coefficients = coefficients_of(before.network)
        box = self.low.tolist(), self.high.tolist()
        network: Any = new_polynomials(*box, self.periodic, self.counts, self.starts.outputs, self.coefficients)
        network[0].has_warned = True  # equations may look ahead
        model = self.constrain(network).double()
        begin = time.monotonic()
        is_converged = self._fit(model, network, until)
        self.seconds = time.monotonic() - begin
        residual, values = self.evaluate(model)
        level = Level(model, network, residual, values, is_converged)
        if before is not None and is_converged:
            level.error = self._estimate_error(level, before)
        return level

    def _estimate_error(self, level: Level, before: Level) -> float:
        """Return the error of a level: the change from the level before, times the fall of the residual."""
        fall = level.residual / max(before.residual, 1e-300)
        if level.residual > UNSOLVED * self.starts.result.first_residual and fall > 0.5:
            return math.inf
        if not math.isfinite(level.residual):
            return math.inf
        size = max(self.search.size, _rms(level.values), 1e-300)
        change = _rms(level.values - before.values) / size
        return change * min(fall, 1.0) + ROUNDING

    def _has_time(self, growth: float, until: float) -> bool:
        """Return whether a level of so many times as many functions ends in time: a step of it takes the square."""
        budget = self.starts.budget
        if not budget.is_timed:
            return budget.allows_step(until)
        needed = self.seconds * growth**2 / budget.size
        return budget.spent() + needed <= until

    def _round(self, counts: Sequence[int]) -> list[int]:
        """Return counts that are odd for periodic coordinates: a cosine comes with its sine."""
        return [count + (i in self.periodic and count % 2 == 0) for i, count in enumerate(counts)]

    def _enlarge(self, network: Any) -> list[int]:
        """Return larger counts for the coordinates whose highest functions have large coefficients."""
        counts = network[0].counts
        squares = coefficients_of(network).square().sum(0)
        tails = []
        for i, count in enumerate(counts):
            tail = max(2, count // 4)
            highest = squares.narrow(i, max(count - tail, 0), min(tail, count)).sum()
            tails.append(math.sqrt(highest.item() / tail))
        largest = max(tails)
        larger = list(counts)
        for i, count in enumerate(counts):
            if tails[i] >= RELEVANT * largest:
                larger[i] = math.ceil(GROWTH * count)
        larger = self._round(larger)
        if self.instant is not None:
            _, most = self.in_time
            larger[self.instant] = min(larger[self.instant], most)
        return larger if math.prod(larger) <= MOST else counts

    def _fit(self, model: HardConstraint, network: nn.Module, until: float) -> bool:
        """Take Gauss-Newton steps on a grid, and return whether they have converged."""
        starts = self.starts
        points_of_function = MANY_POINTS if self.is_correction else POINTS
        counts = [math.ceil(points_of_function * count) + 2 for count in self.counts]
        points = grid_points(self.low, self.high, self.periodic, counts, starts.result.inside)
        points.requires_grad_(starts.differentiates)
        terms: list[Any] = [(self._residual, points), *self.terms]
        optimizer = LevenbergMarquardt(model, DAMPING, floor=FLOOR, forgetting=0.0, memory=2**32)
        functions = [function for _, function in list_functions(model)]
        cache = PointCache(model, functions, self.held)
        token = current_cache.set(cache)
        try:
            with warnings.catch_warnings():
                # at a stationary point, with an equation that has no solution perhaps
                warnings.filterwarnings("ignore", "Step refused", RuntimeWarning)
                for _ in range(STEPS):
                    if starts.budget.is_stopped:
                        return False
                    record = optimizer.step(terms)
                    self.search.steps += 1
                    self.search.record = record
                    if self.is_correction:
                        starts.budget.count_step("correction", record)
                    else:
                        if self.instant is None:
                            self.search.model = model
                        starts.count_step("polynomials", record, self.search.model)
                    if not record.accepted or record.decrease < SLOW:
                        return True
                    if not starts.budget.allows_step(until):
                        return False
        finally:
            current_cache.reset(token)
        return False

    def _residual(self, model: nn.Module, x: Tensor) -> Tensor:
        parameter = self.starts.parameter
        arguments = (x,) if math.isnan(parameter) else (x, parameter)
        values = self.starts.equation(model, *arguments)
        return check_residuals(values, "`residual`", len(x))

    def evaluate(self, model: nn.Module) -> tuple[float, Tensor]:
        """Return the root mean square of the residual at the held-out points, and the values of the model there."""
        x = self.held.clone().requires_grad_(self.starts.differentiates)
        with torch.set_grad_enabled(self.starts.differentiates):
            residuals = self._residual(model, x)
            values = model(x)
        return _rms(residuals), values.detach()


class _Clock:
    """The steps and the seconds of a phase."""

    def __init__(self, search: Polynomials) -> None:
        self.search = search
        self.steps = search.steps
        self.begin = time.monotonic()

    def add_phase(
        self,
        held: float,
        reason: str,
        network: str,
        name: str = "polynomials",
    ) -> None:
        search = self.search
        steps = search.steps - self.steps
        seconds = time.monotonic() - self.begin
        loss = math.nan if search.record is None else search.record.loss
        if search.starts.budget.is_stopped:
            reason = "callback"
        phase = Phase(name, math.nan, steps, seconds, loss, held**2, reason, network)
        search.starts.result.phases.append(phase)


def _freeze(model: HardConstraint) -> HardConstraint:
    """Return a copy of a model whose parameters are not trained."""
    return copy.deepcopy(model).requires_grad_(False)


def _is_causal(term: Any, instant: int, result: Solution) -> bool:
    """Return whether a term, whose first tensor is points of the box, holds at the start or all the time.

    A condition at the end, or at a few times, says nothing in the windows before.
    """
    points = term[1][0]
    if points.dim() != 2 or points.shape[1] != len(result.low):
        return False
    times = (points[:, instant] - result.low[instant]) / (result.high[instant] - result.low[instant])
    if times.max() <= ROUNDING:
        return True
    ends = torch.tensor([0.0, 1.0]).to(times)
    gaps = torch.cat([times, ends]).sort().values.diff()
    return bool(gaps.max() <= LARGEST_GAP)


def _rms(values: Tensor) -> float:
    """Return the root mean square."""
    return values.detach().square().mean().sqrt().item()


def find_time(starts: Starts) -> tuple[int | None, int]:
    """Return the time coordinate, and whether 1 or 2 conditions hold at its start.

    It is the last coordinate at whose low side, and not at its high side, a distance is zero: in proportion to
    the time, or to its square.
    """
    low = starts.result.low.tolist()
    high = starts.result.high.tolist()
    model = starts.result.model
    for i in reversed(range(len(low))):
        sizes = []
        for share in (0.0, 1e-4, 2e-4, 1.0):
            points, _ = side_points(low, high, 50, [(i, "low")])
            points[:, i] = low[i] + share * (high[i] - low[i])
            distance = model.part("distance", points, model.kan(points))
            sizes.append(distance.detach().abs().amax(0))
        start, near, farther, end = sizes
        is_prescribed = (start <= 1e-9 * end) & (end > 0)
        if is_prescribed.any():
            is_proportional = farther < 3 * near
            return i, 1 if is_proportional[is_prescribed].any() else 2
    return None, 1
