# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The training of a solution: points, steps, and when a phase ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kan.network import LayerStack
from ..kan.refinement import refine_grid
from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import LeastSquares, check_residuals
from .adaptive import ResidualSampler, gradient_weights
from .budget import Budget, PhaseEnd
from .checks import layer_inputs
from .continuation import continuation
from .diagnostics import list_functions
from .networks import first_module
from .point_cache import PointCache, current_cache
from .solution import Phase, Solution
from .unknowns import BoundFunction, Estimate, NetworkWithConstants
from .windows import Windows


MOST_POINTS = 4  # times as many points as at first, where fewer have stalled
LARGEST_START_DAMPING = 1e3  # with new points
ATTEMPTS = 3  # at a step that is refused, which may not be on other points
STAGES = 6  # parameters of a continuation
CONTINUED = 0.6  # the share of the budget after which the continuation ends
COARSE = 0.8  # the share of the budget after which grids get finer
SOLVED = 1e-4  # of the first residual's square: where a stage of a continuation ends
FAILED = 1e-3  # of the first residual's square: where a stage of a continuation is undone
MOST_FAILURES = 3  # stages that are undone
FINE_POINTS = 2.5  # times as many points on finer grids
FIRST_WEIGHT = 10.0  # of data, as a multiple of the equation's mean square over theirs
FIXED = 0.1  # the share of a fit for the equation, and then with data, before constants are trained
ROBUST = 0.45  # after which outliers of the equation count less
HEAVY = 0.65  # after which data are light
LIGHT = 0.01  # the factor of the weights then
CONDITION = 100.0  # the least weight of a condition; penalties and data have less
SLOPE = 0.1  # of `gradient_weights`, for a solution of unit size on [-1, 1]
OUTLIER = 3.0  # multiples of the median residual from which points count less


@dataclass
class Training:
    """The state of `solve`, and its steps.

    Attributes:
        result: The solution; its model is trained, and steps and phases are added to it.
        equation: The residual of the equation.
        terms: The terms of the caller, as `check_terms` returns them.
        held: The held-out points, (n, I).
        sampler: Draws the points of each step.
        budget: The steps or seconds that all phases share.
        callback: Called with the solution and the record of each step; the training ends if it returns True.
        constants: The model with unknown constants, with which functions are then called in its place.
        data: The functions of terms whose weights follow from their noise, see `fit_with_data`.
        parameter: Of the equation in the present phase; NaN without continuation.
        network: The name of the network, for the report.
    """

    result: Solution
    equation: Callable[..., Tensor]
    terms: list[Any]
    held: Tensor
    sampler: ResidualSampler
    budget: Budget
    callback: Callable[[Solution, LevenbergMarquardtStep], Any] | None = None
    constants: NetworkWithConstants | None = None
    data: Collection[BoundFunction] = ()
    parameter: float = math.nan
    network: str = ""

    def __post_init__(self) -> None:
        self.model = self.result.model
        self.history = self.result.history
        self.phases = self.result.phases
        self.trained: nn.Module = self.constants or self.model
        self.optimizer = LevenbergMarquardt(self.trained, floor=1e-6, memory=2**32)
        self.first_count = self.sampler.count
        self.first_share = self.sampler.share
        self.share = 0.0, 1.0  # of the budget: where this training begins, and ends
        self.kan: Any = first_module(self.model, LayerStack)  # None if there is none
        self.differentiates = False  # whether the residual needs points that require a gradient
        self.is_over = False  # whether one more step is too much for the phase
        self.robustness = 0.0  # the exponent by which points with a large residual count less
        functions = [function for _, function in list_functions(self.model)]
        self.cache = PointCache(self.model, functions, self.held)

    def continue_from(self, start: float, stop: float) -> None:
        """Solve the equation at parameters from `start` on, each from the solution of the one before."""
        first = self.result.first_residual**2
        before = len(self.phases)

        def stage(parameter: float) -> bool:
            self.parameter = parameter
            number = len(self.phases) - before + 1
            until = min(CONTINUED * number / STAGES, COARSE)
            least = self.fit("continuation", until, SOLVED * first)
            stages = self.phases[before:]
            failures = sum(phase.held > FAILED * first for phase in stages)
            if self.is_over or len(stages) == 1 or failures > MOST_FAILURES:
                return True  # neither the first stage nor one that is out of time can be tried again
            return least / first <= FAILED

        continuation(self.trained, stage, start, stop, STAGES - 1)

    def finish(self, refine: bool) -> float:
        """Train until the budget is used up, the last fifth of it on finer grids if the network has some.

        Returns:
            As `fit`.
        """
        kan = self.kan if refine else None
        fit = self.fit_with_data if self.data else self.fit_on
        until = 1.0 if kan is None else COARSE
        least = fit("coarse", until)
        if kan is None or self.budget.spent() >= 1:
            return least

        name = "coarse"
        samples = layer_inputs(self.model, self.held, kan)
        if self.refine_grids(samples):
            name = "fine"
            self.sampler.count = round(FINE_POINTS * self.sampler.count)
        return fit(name, 1.0)

    def fit_on(self, name: str, until: float) -> float:
        """As `fit`, on more points after a stall."""
        least = self.fit(name, until)
        return self.fit_on_more_points(name, until, least)

    def fit_on_more_points(
        self,
        name: str,
        until: float,
        least: float,
        solved: float = math.inf,
    ) -> float:
        """As `fit`, again and again on twice as many points, while it stalls at a held-out loss of at most `solved`.

        `least` is the least held-out loss before.
        """
        most = MOST_POINTS * self.first_count
        while self.is_stalled and least <= solved and self.sampler.count < most:
            self.sampler.count *= 2
            fitted = self.fit(name, until)
            least = min(least, fitted)
        return least

    def fit_with_data(self, name: str, until: float) -> float:
        """As `fit_on`: the equation at the first constants, heavy data, then constants too, then light data.

        From a random network, constants would follow whatever it is, to an end of their interval perhaps. With heavy
        data the network cannot stay away from them. With light data the equation holds as if there were no noise.
        Where the network cannot solve the equation, at a corner perhaps, its residual would bend the constants:
        outliers count less and less.
        """
        if all(function.scale is not None for function in self.data):  # not for the first time
            return self.fit_on(name, until)

        # the equation alone, and then with data, before constants are trained
        self._set_weights()
        terms = self.terms
        self.terms = []
        self.fit_network("fixed constants", FIXED * until)
        self.terms = terms
        self.fit_network("fixed constants", 2 * FIXED * until)
        for share, robustness in ((ROBUST, 0.5), (HEAVY, 1.0)):
            if self.budget.allows_step(self.end_of(share * until)):
                self.fit_on("heavy data", share * until)
            self.set_robustness(robustness)
        self.scale_data(LIGHT)
        return self.fit_on(name, until)

    def scale_data(self, factor: float) -> None:
        """Multiply the weights of the data, and forget former residuals, which had others."""
        for function in self.data:
            function.scale = factor**0.5 * function.scale
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """Forget former residuals, and take careful steps, as another problem follows."""
        self.optimizer.forget()
        self.optimizer.damping = min(1e-2, 100 * self.optimizer.damping)

    def fit_network(self, name: str, until: float) -> None:
        """As `fit`, with fixed constants."""
        if not self.budget.allows_step(self.end_of(until)):
            return
        module: Any = self.constants
        module.constants.requires_grad_(False)
        self.restart_optimizer()
        self.fit(name, until)
        module.constants.requires_grad_(True)
        self.optimizer.forget()

    def _set_weights(self) -> None:
        """Give each column of data the mean square of the equation's residual, times `FIRST_WEIGHT`."""
        problem, residuals = self.evaluate_held()
        of_equation, *_ = problem.losses(residuals)
        for term, residuals_of_term in zip(problem.terms, problem.split(residuals), strict=True):
            if term.function in self.data:
                rows = (residuals_of_term / term.scale).view(-1, term.columns)
                mean_squares = rows.square().mean(0)
                weights = (FIRST_WEIGHT * of_equation / mean_squares).clamp(1e-12, 1e12)
                term.function.scale = weights.sqrt()  # pyright: ignore[reportFunctionMemberAccess]

    def set_robustness(self, robustness: float) -> None:
        """Let outliers of the equation count less, and points not follow them; by 0 as at first."""
        self.robustness = robustness
        self.sampler.share = 0.0 if robustness else self.first_share

    def end_of(self, until: float) -> float:
        """Return the share of the whole budget, from the share of the part for this training."""
        first, last = self.share
        return first + until * (last - first)

    @property
    def is_stalled(self) -> bool:
        """Whether the last phase has ended before its share of the budget, without a solution."""
        return self.phases[-1].reason in ("stalled", "refused")

    def norm(self) -> float:
        """Return the root mean square of the residual at the held-out points.

        Raises:
            ValueError: A term is not finite there, or malformed.
        """
        try:
            problem, residuals = self.evaluate_held()
        except RuntimeError:  # of `torch.autograd.grad`
            self.differentiates = True
            problem, residuals = self.evaluate_held()
        message = problem.find_not_finite(residuals)
        if message:
            raise ValueError(f"The {message}")
        of_equation, *_ = problem.losses(residuals)
        return math.sqrt(of_equation)

    def condition_losses(self) -> dict[int, float]:
        """Return the losses of the terms of the caller that are conditions by their weight, by number."""
        if not self.terms:
            return {}
        problem, residuals = self.evaluate_held()
        _, *losses = problem.losses(residuals)
        return {number: losses[number] for number, term in enumerate(self.terms) if term[2] >= CONDITION}

    def evaluate_held(self) -> tuple[LeastSquares, Tensor]:
        """Return the least-squares problem of the held-out points and the terms, and its residuals."""
        return self.optimizer.evaluate_held(self.held_terms())

    def held_terms(self) -> list[Any]:
        """Return the equation at the held-out points, and the terms of the caller."""
        points = self.held.requires_grad_(self.differentiates)
        weights = torch.ones_like(points[:, :1])
        if self.robustness:
            weights = self.weights(points)
        equation = (self.residual, (points, weights), 1.0)
        return [equation, *self.terms]

    def residual(self, model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Evaluate the equation: one function in all phases, so that Levenberg-Marquardt tries it once."""
        arguments = (x,) if math.isnan(self.parameter) else (x, self.parameter)
        values = self.equation(model, *arguments)
        return weight * check_residuals(values, "`residual`", len(x))

    def weights(self, x: Tensor) -> Tensor:
        """Compute the weights of points, (n, 1): small where the solution is steep, or the residual an outlier.

        Weights by steepness are divided by
        (1 + (|r| / (OUTLIER median |r|))^2)^(robustness / 2): the weighted residual grows as the root of |r| (absolute
        errors) by 1/2, and is bounded by 1. With unknown constants, steep places count in full: a network with steps
        between the data would solve the equation of other constants.
        """
        weights = torch.ones_like(x[:, :1])
        if self.constants is None:
            # slopes across half of the box, for u of unit size
            with torch.no_grad():
                mean_square = self.model(x).square().mean()
            size = mean_square.sqrt().clamp(min=1e-12).item()
            directions = (self.sampler.high - self.sampler.low).diag() / 2
            weights = gradient_weights(self.model, x, SLOPE / size, directions)
        if not self.robustness:
            return weights

        residuals = self.residual(self.trained, x, weights)
        sizes = residuals.detach().norm(dim=1, keepdim=True)
        smallest = torch.finfo(sizes.dtype).tiny
        scale = OUTLIER * sizes.median().clamp(min=smallest)
        squares = (sizes / scale).square()
        return weights / (1 + squares) ** (self.robustness / 2)

    def fit(
        self,
        name: str,
        until: float,
        target: float = 0.0,
    ) -> float:
        """Take steps until a share of the budget is used up, the residual is at the target, or no longer falls.

        Returns:
            The least mean square of the residual at the held-out points. The model has the parameters of this step.
        """
        if self.budget.is_stopped:
            return math.inf
        solved = FAILED * self.result.first_residual**2
        first, last = self.share
        width = last - first
        if name == "continuation":  # another equation, and a way back
            self.restart_optimizer()
            solved = math.inf
            width = 0.0
        end = PhaseEnd(self.budget, self.end_of(until), target, solved, width)
        held = self.held_terms()

        def finish_step(number: int, record: LevenbergMarquardtStep) -> bool:
            self.cache.clear()
            if name == "start":
                problem, residuals = self.optimizer.evaluate_held(held)
                record = record._replace(held_losses=problem.losses(residuals))
            self.history.append(record)
            self.budget.count_step(name, record)
            if self.callback is not None:
                self._call_back(record)
            return end.is_reached(record.held_loss)

        # a start goes on from its last step, and not from the best one
        restored = [] if name == "start" else held
        begin = time.monotonic()
        steps_before = len(self.history)
        for _ in range(ATTEMPTS):
            token = current_cache.set(self.cache)
            try:
                self.optimizer.fit(
                    self._draw_terms,
                    10**9,
                    held=restored,
                    patience=10**9,
                    callback=finish_step,
                    progress=False,
                )
            finally:
                current_cache.reset(token)
                self.cache.clear()
            record = self.history[-1]
            if record.accepted or end.is_over:
                break

        self.is_over = end.is_over
        steps = len(self.history) - steps_before
        seconds = time.monotonic() - begin
        reason = end.reason(record.accepted)
        phase = Phase(name, self.parameter, steps, seconds, record.loss, end.least, reason, self.network)
        self.phases.append(phase)
        return end.least

    def _draw_terms(self, number: int) -> list[Any]:
        """Return the equation at new points, and the terms of the caller."""
        # the last points may have needed far more damping than new ones
        self.optimizer.damping = min(self.optimizer.damping, LARGEST_START_DAMPING)

        def weighted(x: Tensor) -> Tensor:
            weights = self.weights(x)
            x.requires_grad_(self.differentiates)
            return self.residual(self.trained, x, weights)

        x = self.sampler.draw(weighted)
        x.requires_grad_(self.differentiates)
        equation = (self.residual, (x, self.weights(x)))
        return [equation, *self.terms]

    def _call_back(self, record: LevenbergMarquardtStep) -> None:
        """Show the solution, with all of its windows, to the caller, who may end the training."""
        windows: Windows | None = first_module(self.model, Windows)
        active = None
        if windows is not None:
            active = windows.active
            windows.activate(None)
        if self.constants is not None:
            values = self.constants.values().items()
            self.result.unknowns = {name: Estimate(value.item(), math.nan) for name, value in values}
        answer = self.callback(self.result, record)  # pyright: ignore[reportOptionalCall]
        if isinstance(answer, (bool, np.bool_)) and answer:
            self.budget.is_stopped = True
        if windows is not None:
            windows.activate(active)

    def refine_grids(self, samples: Tensor) -> bool:
        """Make the grids twice as fine if they can be refined."""
        sizes = [getattr(layer, "grid_size", 0) for layer in self.kan.layers]
        try:
            refine_grid(self.kan, 2 * max(sizes), samples)
        except (TypeError, ValueError) as error:  # adapters, Slim layers
            self.result.notes.append(f"The grids stay as they are: {error}")
            return False
        return True
