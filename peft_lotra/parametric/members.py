# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fit of one member of a family, its coordinates and its loss."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import Term, check_residuals, check_terms, in_double, name_term, trainable_parameters
from ..modules.calls import call_with_parameters
from ..modules.checks import check_function
from .held_out import HeldOutPoints
from .interpolation import Member, Point


# The damping of all steps, as a share of the largest diagonal entry of J^T J. Directions in which the residuals hardly
# change are not moved by it, so that members stay comparable: docs/notes/log.md.
DAMPING = 1e-6
WINDOW, SLOW = 4, 0.7  # a fit ends when so many steps left more than this share of the loss


class MissingReturnError(TypeError):
    """A function of the user returns None."""


@dataclass(frozen=True)
class Problem:
    """The functions of the user that members are fitted to, see `ParametricAdapter`, and the most steps of a fit."""

    terms_of: Callable[[Any], Iterable] | None = None
    held_terms_of: Callable[[Any], Iterable] | None = None
    solution_of: Callable[[nn.Module, Any], Any] | None = None
    loss_of: Callable[[nn.Module, Any], Any] | None = None
    values_of: Callable[[nn.Module, Any], Tensor] | None = None
    train: Callable[[nn.Module, Any], Any] | None = None
    max_steps: int = 40
    _held_out: HeldOutPoints = field(default_factory=HeldOutPoints)

    def check_functions(self, with_arguments: bool = False) -> None:
        """Raise a `TypeError` unless these are functions, which take the arguments that they will get."""
        for name, function in vars(self).items():
            if (name.endswith("_of") or name == "train") and function is not None:
                count = 1 if name.endswith("terms_of") else 2
                check_function(function, name, count if with_arguments else None)

    def solution(self, model: nn.Module, parameter: Point) -> Any:
        """The solution of a network at a parameter, by default the network itself."""
        return model if self.solution_of is None else self.call("solution_of", model, argument(parameter))

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the user, which must return something."""
        value = getattr(self, name)(*args)
        if value is None:
            raise MissingReturnError(f"`{name}` returns None. Does it end without `return`?")
        return value

    def terms(self, parameter: Point) -> list[Term]:
        """The terms of the fit, as functions of the network."""
        terms = [] if self.terms_of is None else check_terms(self.call("terms_of", argument(parameter)))
        return self._of_networks(terms, parameter)

    def held_terms(self, model: nn.Module, parameter: Point) -> list[Term]:
        """Terms at points to which no member is fitted, by default between those of the fit; empty if not known."""
        if self.held_terms_of is not None:
            return self._of_networks(check_terms(self.call("held_terms_of", argument(parameter))), parameter)
        solution, dtype = self.solution(model, parameter), next(model.parameters()).dtype
        return self._held_out.of(self.terms(parameter), lambda x: solution(x.to(dtype)))

    def _of_networks(self, terms: list[Term], parameter: Point) -> list[Term]:
        if self.solution_of is None:
            return terms

        def of_network(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return wraps(function)(lambda model, *rows: function(self.solution(model, parameter), *rows))

        return [(of_network(function), rows, weight) for function, rows, weight in terms]

    def fit(self, model: nn.Module, path: Sequence[Point], start: np.ndarray, max_steps: int) -> Member:
        """Fits the trainable parameters of a copy of the model, from the coordinates `start` and along a path of
        parameters to that of the member, which is the last."""
        began, steps, parameter = time.perf_counter(), 0, path[-1]
        model = copy.deepcopy(model)  # other threads fit other members
        write(model, start)
        predicted = self.indicator(model, parameter)
        if self.train is not None:
            trained = copy.deepcopy(model)  # `train` may also change modes and tensors that all members share
            coordinates = trainable_parameters(trained)
            self.train(trained, argument(parameter))
            write(model, read(coordinates))
        else:
            for point in path:
                steps += take_steps(model, self.terms(point), max_steps, self.held_terms(model, point))
        vector, indicator = read(trainable_parameters(model)), self.indicator(model, parameter)
        has_loss = self.terms_of is not None or self.loss_of is not None
        if not np.isfinite(vector).all() or (has_loss and not math.isfinite(indicator)):
            raise ValueError(f"The fitted member has NaN or infinite coordinates or residuals: {indicator}.")
        return Member(parameter, vector, predicted, indicator, steps, time.perf_counter() - began)

    def indicator(self, model: nn.Module, parameter: Point) -> float:
        """The loss of `loss_of`, or else the root of the loss at held-out points (at those of the fit if there are
        none); NaN without terms."""
        if self.loss_of is not None:
            with torch.no_grad():
                return float(self.call("loss_of", self.solution(model, parameter), argument(parameter)))
        terms = self.held_terms(model, parameter) or self.terms(parameter)
        return residuals_of(model, terms).norm().item() if terms else math.nan


def argument(point: Point) -> float | Point:
    """The parameter as functions of the user get it: a number if there is only one."""
    return point[0] if len(point) == 1 else point


def read(parts: Mapping[str, Tensor]) -> np.ndarray:
    """The coordinates (P,) of a model in its trainable parameters, in float64."""
    return torch.cat([part.detach().double().cpu().flatten() for part in parts.values()]).numpy()


@torch.no_grad()
def write(model: nn.Module, vector: np.ndarray) -> None:
    """Gives a model the coordinates (P,)."""
    parameters = trainable_parameters(model)
    for name, value in named(parameters, vector).items():
        parameters[name].copy_(value)


def named(parameters: Mapping[str, Tensor], vector: np.ndarray) -> dict[str, Tensor]:
    """Split coordinates (P,) into tensors that replace these parameters."""
    values = torch.from_numpy(vector).split([parameter.numel() for parameter in parameters.values()])
    pairs = zip(parameters.items(), values, strict=True)
    return {name: value.view_as(parameter).to(parameter) for (name, parameter), value in pairs}


@torch.no_grad()
def residuals_of(model: nn.Module, terms: Iterable) -> Tensor:
    """The residuals (M,) of terms in float64, whose sum of squares is the loss of `LevenbergMarquardt`."""
    exact, parts = in_double(model), []
    for index, (function, rows, weight) in enumerate(check_terms(terms)):
        rows = tuple(row.double() if row.is_floating_point() else row for row in rows)
        values = call_with_parameters(model, exact, partial(function, model), rows, {})
        values = check_residuals(values, name_term(index, function), len(rows[0]))
        parts.append(math.sqrt(weight / len(rows[0])) * values.flatten())
    return torch.cat(parts)


def take_steps(model: nn.Module, terms: Sequence[Term], most: int, held: Sequence[Term] = (), least: int = 0) -> int:
    """Takes Levenberg-Marquardt steps while the loss falls fast, that of `held` if there are such terms; at least
    `least`, and at most `most`. Returns their number."""
    optimizer, losses = LevenbergMarquardt(model, DAMPING, floor=1.0), []

    def is_done(number: int, record: LevenbergMarquardtStep) -> bool:
        optimizer.damping = max(optimizer.damping, DAMPING)
        losses.append(record.held_loss if held else record.loss)
        return number >= max(WINDOW, least) and losses[-1] > SLOW * losses[-1 - WINDOW]

    return len(optimizer.fit(terms, most, held=held, callback=is_done, progress=False))


Job = tuple[Sequence[Point], np.ndarray, int]  # the arguments of `Problem.fit`


def attempt(model: nn.Module, problem: Problem, job: Job) -> Member | str:
    """The fitted member of a job, or the error of a function of the user."""
    try:
        return problem.fit(model, *job)
    except Exception as error:  # as text, since errors of users need not be picklable
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} (line {place.lineno} of {place.filename})"
