# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fit of one member of a family, its coordinates and its loss."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import (
    Term,
    check_residuals,
    check_terms,
    in_double,
    name_term,
    trainable_parameters,
    write_vector,
)
from ..modules.calls import call_with_parameters
from .held_out import held_out_terms
from .interpolation import Member, Point


# The damping of all steps, as a share of the largest diagonal entry of J^T J. It stops directions in which the
# residuals hardly change, and members stay comparable.
MEMBER_DAMPING = 1e-6
WINDOW = 4  # steps that are compared
SLOW = 0.7  # a fit ends when these steps left more than this share of the loss

TermsOf = Callable[[Any], Iterable]  # a function of the parameter
OfModel = Callable[[nn.Module, Any], Any]  # a function of a network, or a solution, and the parameter


@dataclass(frozen=True)
class Problem:
    """The functions of the user that members are fitted to, see `ParametricAdapter`."""

    terms_of: TermsOf | None = None
    held_terms_of: TermsOf | None = None
    solution_of: OfModel | None = None
    loss_of: OfModel | None = None
    values_of: OfModel | None = None
    train: OfModel | None = None

    def solution(self, model: nn.Module, parameter: Point) -> Any:
        """Return the solution of a network at a parameter, by default the network."""
        return model if self.solution_of is None else self.solution_of(model, argument(parameter))

    def terms(self, parameter: Point) -> list[Term]:
        """Return the terms of the fit, as functions of the network; none without `terms_of`."""
        if self.terms_of is None:
            return []
        return self._of_networks(self.terms_of, parameter)

    def held_terms(self, model: nn.Module, parameter: Point) -> dict[int, Term]:
        """Return terms, by number, at points that no member is fitted to, by default between the points of the fit."""
        if self.held_terms_of is not None:
            return dict(enumerate(self._of_networks(self.held_terms_of, parameter)))
        solution = self.solution(model, parameter)
        like = next(model.parameters())
        return held_out_terms(self.terms(parameter), lambda x: solution(x.to(like.dtype)))

    def _of_networks(self, terms_of: TermsOf, parameter: Point) -> list[Term]:
        """Return the terms of a function of the user, as functions of the network instead of the solution."""
        terms = check_terms(terms_of(argument(parameter)))
        if self.solution_of is None:
            return terms

        def call_solution(
            function: Callable[..., Tensor],
            model: nn.Module,
            *rows: Tensor,
        ) -> Tensor:
            return function(self.solution(model, parameter), *rows)

        of_networks = []
        for function, rows, weight in terms:
            of_network = update_wrapper(partial(call_solution, function), function)
            of_networks.append((of_network, rows, weight))
        return of_networks

    def fit(
        self,
        model: nn.Module,
        path: Sequence[Point],
        start: np.ndarray,
        max_steps: int,
    ) -> Member:
        """Fit the trainable parameters of a copy of the model.

        The fit starts from the coordinates `start` and follows a path of parameters. The last one is the member's.
        """
        begin = time.perf_counter()
        steps = 0
        parameter = path[-1]
        model = copy.deepcopy(model)  # other threads fit other members
        write(model, start)
        predicted = self.indicator(model, parameter)

        if self.train is None:
            for point in path:
                held_out = self.held_terms(model, point).values()
                steps += take_steps(model, self.terms(point), max_steps, held_out)
        else:
            trained = copy.deepcopy(model)  # `train` may also change modes and tensors that all members share
            coordinates = trainable_parameters(trained)
            self.train(trained, argument(parameter))
            write(model, read(coordinates))

        vector = read(trainable_parameters(model))
        indicator = self.indicator(model, parameter)
        has_indicator = self.terms_of is not None or self.loss_of is not None
        is_broken = has_indicator and not math.isfinite(indicator)
        if is_broken or not np.isfinite(vector).all():
            raise ValueError(f"The fitted member has NaN or infinite coordinates or residuals: {indicator}.")
        seconds = time.perf_counter() - begin
        return Member(parameter, vector, predicted, indicator, steps, seconds)

    def indicator(self, model: nn.Module, parameter: Point) -> float:
        """Return the loss of `loss_of`, or else the root of the loss at held-out points; NaN without terms.

        Without held-out points, the points of the fit count.
        """
        if self.loss_of is not None:
            with torch.no_grad():
                solution = self.solution(model, parameter)
                return float(self.loss_of(solution, argument(parameter)))
        terms = self.held_terms(model, parameter).values() or self.terms(parameter)
        return residuals_of(model, terms).norm().item() if terms else math.nan


def argument(point: Point) -> float | Point:
    """Return the parameter as functions of the user get it: a number if there is only one."""
    return point[0] if len(point) == 1 else point


def read(parameters: Mapping[str, Tensor]) -> np.ndarray:
    """Return the coordinates (P,) of a model in its trainable parameters, in float64."""
    return parameters_to_vector(parameters.values()).detach().double().cpu().numpy()


def write(model: nn.Module, vector: np.ndarray) -> None:
    """Give a model the coordinates (P,)."""
    write_vector(trainable_parameters(model), torch.from_numpy(vector))


@torch.no_grad()
def residuals_of(model: nn.Module, terms: Iterable[Term]) -> Tensor:
    """Compute the residuals (M,) of terms in float64, whose sum of squares is the loss of `LevenbergMarquardt`."""
    exact = in_double(model)
    residuals = []
    for index, (function, rows, weight) in enumerate(terms):
        rows = tuple(row.double() if row.is_floating_point() else row for row in rows)
        count = len(rows[0])
        values = call_with_parameters(model, exact, partial(function, model), rows, {})
        values = check_residuals(values, name_term(index, function), count)
        residuals.append(math.sqrt(weight / count) * values.flatten())
    return torch.cat(residuals)


def take_steps(
    model: nn.Module,
    terms: Sequence[Term],
    most: int,
    held_out: Iterable[Term] = (),
    least: int = 0,
) -> int:
    """Take Levenberg-Marquardt steps while the loss falls fast, the loss of `held_out` if there are such terms.

    Returns:
        The number of steps, from `least` to `most`.
    """
    optimizer = LevenbergMarquardt(model, MEMBER_DAMPING, floor=1.0)
    losses = []

    def is_done(number: int, record: LevenbergMarquardtStep) -> bool:
        optimizer.damping = max(optimizer.damping, MEMBER_DAMPING)
        losses.append(record.held_loss if held_out else record.loss)
        if number < max(WINDOW, least):
            return False
        return losses[-1] > SLOW * losses[-1 - WINDOW]

    history = optimizer.fit(terms, most, held=held_out, callback=is_done, progress=False)
    return len(history)


Job = tuple[Sequence[Point], np.ndarray, int]  # the arguments of `Problem.fit`


def attempt(model: nn.Module, problem: Problem, job: Job) -> Member | str:
    """Return the fitted member of a job, or the error of a function of the user."""
    try:
        return problem.fit(model, *job)
    except Exception as error:  # as text, since errors of users need not be picklable
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} (line {frame.lineno} of {frame.filename})"
