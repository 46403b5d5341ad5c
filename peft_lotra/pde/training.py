# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The training of a solution: points, steps, knots, and when a phase ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.knots import KnotMap
from ..kan.network import LayerStack
from ..kan.refinement import refine_grid
from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import LeastSquares, check_residuals, check_terms
from .adaptive import ResidualSampler, gradient_weights, knot_density
from .budget import Budget
from .checks import layer_inputs
from .continuation import continuation
from .diagnostics import list_functions
from .features import BoxFeatures
from .networks import first_module
from .point_cache import PointCache, current_cache
from .solution import Phase, Solution
from .unknowns import BoundFunction, NetworkWithConstants
from .windows import Windows


PATIENCE = 15  # steps without a new minimum of the residual that is held out, at least
UNSOLVED_PATIENCE = 50  # the same while that residual is large, where it often rises before it falls
STALLED = 0.1  # the share of the budget without a new minimum, at least
MOST_POINTS = 4  # times as many points as at first, where fewer have stalled
LARGEST_START_DAMPING = 1e3  # with new points
STAGES = 6  # parameters of a continuation
CONTINUED = 0.6  # the share of the budget after which the continuation ends
COARSE = 0.8  # the share of the budget after which grids get finer
SOLVED = 1e-4  # of the first residual's square: where a stage of a continuation ends
FAILED = 1e-3  # of the first residual's square: where a stage of a continuation is undone
MOST_FAILURES = 3  # stages that are undone
FINE_POINTS = 2.5  # times as many points on finer grids
FIRST_WEIGHT = 10.0  # of data, as a multiple of the equation's mean square over theirs
FIXED, HEAVY = 0.15, 0.7  # shares of the budget after which constants are trained, and data are light
LIGHT = 0.01  # the factor of the weights then
SLOPE = 0.1  # of `gradient_weights`, for a solution of unit size on [-1, 1]


@dataclass
class Training:
    """The state of `solve`, and its steps.

    Attributes:
        result: The solution; its model is trained, and steps and phases are added to it.
        equation: The residual of the equation.
        terms: The terms of the caller.
        held: The points that are held out, (n, I).
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
        self.model, self.history, self.phases = self.result.model, self.result.history, self.result.phases
        self.trained: nn.Module = self.model if self.constants is None else self.constants
        self.optimizer = LevenbergMarquardt(self.trained, floor=1e-6, memory=2**32)
        self.first_count = self.sampler.count
        self.share = 0.0, 1.0  # of the budget: where this training begins, and ends
        self.kan: Any = first_module(self.model, LayerStack)  # None if there is none
        self.features: BoxFeatures | None = first_module(self.model, BoxFeatures)
        self.differentiates = False  # whether the residual needs points that require a gradient
        self.is_over = False  # whether one more step is too much for the phase
        functions = [function for _, function in list_functions(self.model)]
        self.cache = PointCache(self.model, functions, self.held)

    def continue_from(self, start: float, stop: float) -> None:
        """Solve the equation at parameters from `start` on, each from the solution of the one before."""
        first, before = self.result.first_residual**2, len(self.phases)

        def stage(parameter: float) -> float:
            until = min(CONTINUED * (len(self.phases) - before + 1) / STAGES, COARSE)
            least = self.fit("continuation", parameter, until, SOLVED * first)
            stages = self.phases[before:]
            failures = sum(phase.held > FAILED * first for phase in stages)
            if self.is_over or len(stages) == 1 or failures > MOST_FAILURES:
                return 0.0  # neither the first stage nor one that is out of time can be tried again
            return least / first

        continuation(self.trained, stage, start, stop, target=FAILED, prepare=self.move_knots, steps=STAGES - 1)

    def finish(self, parameter: float, refine: bool) -> float:
        """Train until the budget is used up, the last fifth of it on finer grids if the network has some.

        Returns:
            As `fit`.
        """
        kan = self.kan if refine else None
        fit = self.fit_with_data if self.data else self.fit_on
        least = fit("coarse", parameter, 1.0 if kan is None else COARSE)
        if kan is not None and self.budget.spent() < 1:
            is_finer = self.regrid(2, samples=layer_inputs(self.model, self.held, kan))
            if is_finer:
                self.sampler.count = round(FINE_POINTS * self.sampler.count)
            least = fit("fine" if is_finer else "coarse", parameter, 1.0)
        return least

    def fit_on(self, name: str, parameter: float, until: float) -> float:
        """As `fit`, on twice as many points after each stall."""
        least = self.fit(name, parameter, until)
        while self.is_stalled and self.add_points():
            least = min(least, self.fit(name, parameter, until))
        return least

    def fit_with_data(self, name: str, parameter: float, until: float) -> float:
        """As `fit_on`: the equation at the first constants, then constants with heavy data, then with light ones.

        From a random network, constants would follow whatever it is. With heavy data the network cannot stay away from
        them. With light data the equation holds as if there were no noise.
        """
        if any(function.scale is None for function in self.data):
            self._set_weights(parameter)
            if self.budget.allows_step(FIXED * until):
                self._fit_equation(parameter, FIXED * until)
            if self.budget.allows_step(HEAVY * until):
                self.fit_on("heavy data", parameter, HEAVY * until)
            for function in self.data:
                function.scale = LIGHT**0.5 * function.scale
            self.optimizer.forget()
        return self.fit_on(name, parameter, until)

    def _set_weights(self, parameter: float) -> None:
        """Give each column of data the mean square of the equation's residual, times `FIRST_WEIGHT`."""
        self.parameter = parameter
        problem, residuals = self.evaluate_held()
        of_equation = problem.losses(residuals)[0]
        parts = residuals.split([len(term.rows[0]) * term.columns for term in problem.terms])
        for term, part in zip(problem.terms, parts, strict=True):
            if term.function in self.data:
                mean_squares = (part / term.scale).view(-1, term.columns).square().mean(0)
                weights = (FIRST_WEIGHT * of_equation / mean_squares).clamp(1e-12, 1e12)
                term.function.scale = weights.sqrt()  # pyright: ignore[reportFunctionMemberAccess]

    def _fit_equation(self, parameter: float, until: float) -> None:
        """Train the network alone, without terms."""
        module: Any = self.constants
        terms, self.terms = self.terms, []
        module.constants.requires_grad_(False)
        self.fit("fixed constants", parameter, until)
        module.constants.requires_grad_(True)
        self.terms = terms
        self.optimizer.forget()

    @property
    def is_stalled(self) -> bool:
        """Whether the last phase has ended before its share of the budget, without a solution."""
        return self.phases[-1].reason in ("stalled", "refused")

    def add_points(self) -> bool:
        """Double the points of a step, unless there are `MOST_POINTS` times as many."""
        is_possible = self.sampler.count < MOST_POINTS * self.first_count
        if is_possible:
            self.sampler.count *= 2
        return is_possible

    def norm(self, parameter: float) -> float:
        """Return the root mean square of the residual at the held-out points.

        Raises:
            ValueError: A term is not finite there, or malformed.
        """
        self.parameter = parameter
        try:
            problem, residuals = self.evaluate_held()
        except RuntimeError:  # of `torch.autograd.grad`
            self.differentiates = True
            problem, residuals = self.evaluate_held()
        if message := problem.find_not_finite(residuals):
            raise ValueError(f"The {message}")
        return math.sqrt(problem.losses(residuals)[0])

    def evaluate_held(self) -> tuple[LeastSquares, Tensor]:
        """Return the least-squares problem of the held-out points and the terms, and its residuals."""
        return self.optimizer.evaluate_held(self.held_terms())

    def held_terms(self) -> list[Any]:
        """Return the equation at the held-out points, and the terms of the caller."""
        points = self.held.requires_grad_(self.differentiates)
        return check_terms([(self.residual, (points, torch.ones_like(points[:, :1]))), *self.terms])

    def residual(self, model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Evaluate the equation: one function in all phases, so that Levenberg-Marquardt tries it once."""
        arguments = (x,) if math.isnan(self.parameter) else (x, self.parameter)
        return weight * check_residuals(self.equation(model, *arguments), "`residual`", len(x))

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """See `gradient_weights`, for slopes across half of the box, and u of unit size."""
        size = self.model(x).square().mean().sqrt().clamp(min=1e-12).item()
        return gradient_weights(self.model, x, SLOPE / size, (self.sampler.high - self.sampler.low).diag() / 2)

    def fit(self, name: str, parameter: float, until: float, target: float = 0.0) -> float:
        """Take steps until a share of the budget is used up, the residual is at the target, or does not fall any more.

        Returns:
            The least mean square of the residual at the held-out points. The model has the parameters of this step.
        """
        if self.budget.is_stopped:
            return math.inf
        optimizer = self.optimizer
        begin, end = self.share
        until = begin + until * (end - begin)
        start, before = time.monotonic(), len(self.history)
        self.parameter = parameter
        if name == "continuation":  # another equation
            optimizer.forget()
            optimizer.damping = min(1e-2, 100 * optimizer.damping)
        is_linear = self.features is not None and not self.features.waves.any()
        knots = first_module(self.model, KnotMap) if is_linear else None  # of the box's coordinates

        def weighted(x: Tensor) -> Tensor:
            weights = self.weights(x)
            return self.residual(self.trained, x.requires_grad_(self.differentiates), weights)

        def draw(number: int) -> list[Any]:
            optimizer.damping = min(optimizer.damping, LARGEST_START_DAMPING)
            x = self.sampler.draw(weighted, knots).requires_grad_(self.differentiates)
            return [(self.residual, (x, self.weights(x))), *self.terms]

        least, at_least = math.inf, (before, self.budget.spent())  # the step and the budget of the least held loss

        def stop(number: int, record: LevenbergMarquardtStep) -> bool:
            nonlocal least, at_least
            self.cache.clear()
            if name == "start":
                problem, residuals = optimizer.evaluate_held(held)
                record = record._replace(held_losses=problem.losses(residuals))
            self.history.append(record)
            self.budget.count_step(name, record)
            if self.callback is not None:
                self._call_back(record)
            self.is_over = not self.budget.allows_step(until)
            spent = self.budget.spent()
            if record.held_loss < least:
                least, at_least = record.held_loss, (len(self.history), spent)
            # a continuation can go back, and does not wait
            is_solved = name == "continuation" or least <= FAILED * self.result.first_residual**2
            is_late = name == "continuation" or spent - at_least[1] >= STALLED * (end - begin)
            is_stalled = is_late and len(self.history) - at_least[0] >= (PATIENCE if is_solved else UNSOLVED_PATIENCE)
            return self.is_over or is_stalled or record.held_loss <= target

        held = self.held_terms()
        for _ in range(3):  # a step that is refused may not be on other points
            # a start goes on from its last step, and not from the best one
            restored = [] if name == "start" else held
            token = current_cache.set(self.cache)
            try:
                optimizer.fit(draw, 10**9, held=restored, patience=10**9, callback=stop, progress=False)
            finally:
                current_cache.reset(token)
                self.cache.clear()
            if self.history[-1].accepted or self.is_over:
                break
        records = self.history[before:]
        last = records[-1]
        reason = "budget" if self.is_over else "stalled" if last.accepted else "refused"
        reason = "solved" if least <= target else reason
        reason = "callback" if self.budget.is_stopped else reason
        seconds = time.monotonic() - start
        self.phases.append(Phase(name, parameter, len(records), seconds, last.loss, least, reason, self.network))
        return least

    def _call_back(self, record: LevenbergMarquardtStep) -> None:
        """Show the solution, with all of its windows, to the caller, who may end the training."""
        windows: Windows | None = first_module(self.model, Windows)
        active = None if windows is None else windows.active
        if windows is not None:
            windows.activate(None)
        if self.callback(self.result, record) is True:  # pyright: ignore[reportOptionalCall]
            self.budget.is_stopped = True
        if windows is not None:
            windows.activate(active)

    def move_knots(self, parameter: float) -> None:
        """Move the knots of the first layer to where the solution bends, once there is one."""
        if self.phases and self.features is not None and self.kan is not None and not self.budget.is_stopped:
            density = torch.ones(self.features.out_features, 64, dtype=torch.float64)
            of_coordinates = knot_density(self.model, self.sampler.low.tolist(), self.sampler.high.tolist())
            for j, i in enumerate(self.features.sources.tolist()):
                if i not in self.features.periodic:
                    density[j] = of_coordinates[i]
            self.regrid(1, density=density, tolerance=math.inf)

    def regrid(self, factor: int, **options: Any) -> bool:
        """Change the grids if they can be changed."""
        size = max(getattr(layer, "grid_size", 0) for layer in self.kan.layers)
        try:
            refine_grid(self.kan, factor * size, **options)
        except (TypeError, ValueError) as error:  # adapters, Slim layers
            note = f"The grids stay as they are: {error}"
            if note not in self.result.notes:
                self.result.notes.append(note)
            return False
        return True
