# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The recipe that solves the standard problems from scratch, and its parts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor, nn

from peft_lotra.kan import KAN, refine_grid
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import HardConstraint, ResidualSampler, box_points
from peft_lotra.pde.adaptive import gradient_weights
from problems.standard import Problem


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        width, grid_size, spline_order: of the network [inputs, width, width, outputs], whose activations are bounded.
        stages: parameters of the continuation, in equal ratios.
        steps, most, target: Levenberg-Marquardt steps at each parameter, and the most that are taken until the loss is
            below `target` times the first one. A problem without continuation takes `stages` times `steps` at once.
        points, forgetting: collocation points, drawn anew for each step, and the factor by which Levenberg-Marquardt
            forgets former ones, during the continuation.
        settle, settle_points: steps after the continuation, and their points.
        last, last_points, refined: steps and points on grids of `refined` intervals.
        last_forgetting: the factor after the continuation.
        slope_scale: of `gradient_weights`.
    """

    width: int = 8
    grid_size: int = 8
    spline_order: int = 5
    stages: int = 6
    steps: int = 10
    most: int = 30
    target: float = 1e-4
    points: int = 1500
    forgetting: float = 0.3
    settle: int = 20
    settle_points: int = 2000
    last: int = 12
    last_points: int = 4000
    refined: int = 16
    last_forgetting: float = 0.8
    slope_scale: float = 0.1


QUICK = Recipe(width=3, grid_size=4, stages=2, steps=2, most=3, points=150, settle=2, settle_points=150, last=3)
QUICK = replace(QUICK, last_points=200, refined=8)


class Collocation:
    """The terms of a problem at one parameter, on points that are drawn anew for each step.

    Args:
        problem, parameter: what is solved.
        model: whose residual the points follow, and whose slopes weigh them.
        sampler: of the points.
        slope_scale: of `gradient_weights`.
    """

    def __init__(
        self, problem: Problem, parameter: float, model: nn.Module, sampler: ResidualSampler, slope_scale: float
    ) -> None:
        self.problem, self.model, self.sampler, self.slope_scale = problem, model, sampler, slope_scale

        def residual(model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
            return weight * problem.residual(model, x, parameter)

        self.residual = residual  # one object, for which Levenberg-Marquardt plans once

    def terms(self) -> list[tuple]:
        """The next terms."""
        x = self.sampler.draw(lambda x: self.residual(self.model, x, self._weights(x)))
        return [(self.residual, (x, self._weights(x)), 1.0), *self.problem.terms()]

    def _weights(self, x: Tensor) -> Tensor:
        return gradient_weights(self.model, x, self.slope_scale)


def new_network(problem: Problem, recipe: Recipe) -> KAN:
    widths = [problem.features.out_features, recipe.width, recipe.width, problem.outputs]
    return KAN(widths, recipe.grid_size, recipe.spline_order, norm="tanh", dtype=torch.float64)


def new_mlp(problem: Problem) -> nn.Sequential:
    """The rival: a tanh network of three layers of 25, about as many parameters as the KAN has."""
    widths = [problem.features.out_features, 25, 25, 25, problem.outputs]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight)
        nn.init.uniform_(linear.bias, -1, 1)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def constrained(problem: Problem, kan: nn.Module) -> HardConstraint:
    """The network with the exact conditions of the problem."""
    return HardConstraint(nn.Sequential(problem.features, kan), problem.distance, problem.lift)


class Run:
    """One training of a KAN; `curve` has the CPU seconds, the steps and the error after each stage."""

    def __init__(self, problem: Problem, recipe: Recipe, seed: int, console: Console) -> None:
        torch.manual_seed(seed)
        self.problem, self.recipe, self.seed, self.console = problem, recipe, seed, console
        self.network = new_network(problem, recipe)
        self.model = constrained(problem, self.network)
        self.sampler = ResidualSampler(problem.low, problem.high, recipe.points, seed=1000 * seed)
        self.optimizer = LevenbergMarquardt(self.model, floor=1e-6, forgetting=recipe.forgetting, memory=2**32)
        self.parameter = self.first_loss = math.nan
        self.curve: list[tuple[float, int, float]] = []
        self.steps, self.seconds, self.clock = 0, 0.0, 0.0

    def train(self) -> None:
        recipe, problem = self.recipe, self.problem
        problem.reference()  # outside of the seconds
        self.clock = time.process_time()
        if problem.start != problem.stop:
            for stage in range(recipe.stages):
                share = stage / (recipe.stages - 1)
                self.fit(problem.start * (problem.stop / problem.start) ** share, recipe.steps, recipe.most)
        self.optimizer.forgetting = recipe.last_forgetting
        self.sampler.count = recipe.settle_points
        if problem.start == problem.stop:
            self.fit(problem.stop, recipe.stages * recipe.steps)
        self.fit(problem.stop, recipe.settle)
        if recipe.refined == recipe.grid_size:
            return
        self.sampler.count = recipe.last_points
        samples = problem.features(box_points(problem.low, problem.high, 2000, seed=self.seed))
        refine_grid(self.network, recipe.refined, samples)
        self.optimizer.forget()
        for _ in range(3):
            self.fit(problem.stop, recipe.last // 3)

    def fit(self, parameter: float, steps: int, most: int = 0) -> None:
        recipe = self.recipe
        points = Collocation(self.problem, parameter, self.model, self.sampler, recipe.slope_scale)
        if parameter != self.parameter:
            self.optimizer.forget()  # residuals of another equation
            self.optimizer.damping = min(1e-2, 100 * self.optimizer.damping)
            self.parameter = parameter
        loss = math.inf
        for step in range(max(steps, most)):
            if step >= steps and loss < recipe.target * self.first_loss:
                break
            record = self.optimizer.step(points.terms())
            self.optimizer.damping = min(self.optimizer.damping, 1e3)
            self.steps += 1
            loss = record.loss
            if math.isnan(self.first_loss):
                self.first_loss = loss / (1 - record.decrease)
        self.seconds += time.process_time() - self.clock
        error = self.problem.error(self.model)
        self.curve.append((self.seconds, self.steps, error))
        self.console.print(
            f"{self.problem.name} seed {self.seed}: parameter {parameter:.3g}, loss {loss:.1e}, "
            f"error {error:.2e} after {self.steps} steps, {self.seconds:.1f} CPU s"
        )
        self.clock = time.process_time()
