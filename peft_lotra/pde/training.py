# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The training of a solution: points, steps, and when a phase ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kan.refinement import refine_grid
from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import LeastSquares, check_residuals
from .adaptive import ResidualSampler, gradient_weights
from .budget import Budget, PhaseEnd
from .checks import layer_inputs
from .diagnostics import list_functions
from .point_cache import PointCache, current_cache
from .solution import Phase, Solution


MOST_POINTS = 4  # times as many points as at first, where fewer have stalled
LARGEST_START_DAMPING = 1e3  # with new points
ATTEMPTS = 3  # at a step that is refused, which may not be on other points
COARSE = 0.8  # the share of the budget after which grids get finer
FAILED = 1e-3  # of the first residual's square: a larger loss is far from a solution
FINE_POINTS = 2.5  # times as many points on finer grids
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
        trained: The module that functions are called with and whose parameters are trained; None for the model.
        parameter: Of the equation in the present phase; NaN without continuation.
        network: The name of the network, for the report.
        weighs_slopes: Whether points count less where the solution is steep.
        robustness: The exponent by which points with a large residual count less.
    """

    result: Solution
    equation: Callable[..., Tensor]
    terms: list[Any]
    held: Tensor
    sampler: ResidualSampler
    budget: Budget
    callback: Callable[[Solution, LevenbergMarquardtStep], Any] | None = None
    trained: Any = None
    parameter: float = math.nan
    network: str = ""
    weighs_slopes: bool = True
    robustness: float = 0.0

    def __post_init__(self) -> None:
        self.model = self.result.model
        self.history = self.result.history
        self.phases = self.result.phases
        if self.trained is None:
            self.trained = self.model
        self.optimizer = LevenbergMarquardt(self.trained, floor=1e-6, memory=2**32)
        self.first_count = self.sampler.count
        self.share = 0.0, 1.0  # of the budget: where this training begins, and ends
        self.differentiates = False  # whether the residual needs points that require a gradient
        self.is_over = False  # whether one more step is too much for the phase
        functions = [function for _, function in list_functions(self.model)]
        self.cache = PointCache(self.model, functions, self.held)

    def finish(self, fit: Callable[[str, float], float], kan: Any) -> None:
        """Train by `fit` until the budget is used up, the last fifth of it on finer grids of `kan` if there is one."""
        if kan is None:
            fit("coarse", 1.0)
            return
        fit("coarse", COARSE)
        if self.budget.spent() >= 1:
            return
        name = "coarse"
        if self._refine_grids(kan):
            name = "fine"
            self.sampler.count = round(FINE_POINTS * self.sampler.count)
        fit(name, 1.0)

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

    def restart_optimizer(self) -> None:
        """Forget former residuals, and take careful steps, as another problem follows."""
        self.optimizer.forget()
        self.optimizer.damping = min(1e-2, 100 * self.optimizer.damping)

    def end_of(self, until: float) -> float:
        """Return the share of the whole budget, from the share of the part for this training."""
        first, last = self.share
        return first + until * (last - first)

    def allows_step(self, until: float) -> bool:
        """Return whether one more step ends before a share of the budget is used up."""
        return self.budget.allows_step(self.end_of(until))

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
        errors) by 1/2, and is bounded by 1.
        """
        weights = torch.ones_like(x[:, :1])
        if self.weighs_slopes:
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
        *,
        is_patient: bool = True,
    ) -> float:
        """Take steps until a share of the budget is used up, the residual is at the target, or no longer falls.

        It has more patience for a large residual, unless `is_patient` is false.

        Returns:
            The least mean square of the residual at the held-out points. The model has the parameters of this step.
        """
        if self.budget.is_stopped:
            return math.inf
        solved = FAILED * self.result.first_residual**2
        first, last = self.share
        width = last - first
        if not is_patient:
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
            answer = None if self.callback is None else self.callback(self.result, record)
            if isinstance(answer, (bool, np.bool_)) and answer:
                self.budget.is_stopped = True
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

    def _refine_grids(self, kan: Any) -> bool:
        """Make the grids twice as fine if they can be refined."""
        samples = layer_inputs(self.model, self.held, kan)
        sizes = [getattr(layer, "grid_size", 0) for layer in kan.layers]
        try:
            refine_grid(kan, 2 * max(sizes), samples)
        except (TypeError, ValueError) as error:
            self.result.notes.append(f"The grids stay as they are: {error}")
            return False
        return True
