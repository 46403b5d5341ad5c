# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fit of one member of a family, its coordinates and its loss."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..modules.calls import call_with_parameters
from ..optim.least_squares import check_terms
from ..optim.levenberg_marquardt import LevenbergMarquardt


Point = tuple[float, ...]

# The damping of all steps, as a share of the largest diagonal entry of J^T J. Directions in which the residuals hardly
# change are not moved by it, so that members stay comparable: docs/notes/parametric.md.
DAMPING = 1e-6


class Member(NamedTuple):
    """A fitted member of a family."""

    parameter: Point
    vector: np.ndarray  # (P,), the trained parameters of the adapter, in float64
    predicted: float  # the indicator of the prediction that it started from
    indicator: float  # that of the member
    steps: int
    seconds: float


@dataclass(frozen=True)
class Problem:
    """The functions of the user that members are fitted to, and the numbers of steps.

    Attributes:
        terms_of: `terms_of(c)` returns the residual terms at the parameter c.
        loss_of: `loss_of(model, c)` returns the indicator, instead of the terms.
        train: `train(model, c)` trains the model in place, where there are no terms.
        steps, max_steps: The least and the most Levenberg-Marquardt steps of a member.
    """

    terms_of: Callable[[Any], Iterable] | None = None
    loss_of: Callable[[nn.Module, Any], Any] | None = None
    train: Callable[[nn.Module, Any], Any] | None = None
    steps: int = 3
    max_steps: int = 12

    def fit(self, model: nn.Module, parameter: Point, start: np.ndarray) -> Member:
        """Fits the trainable parameters of a copy of the model, from the coordinates `start`."""
        began, steps = time.perf_counter(), 0
        model = copy.deepcopy(model)  # other threads fit other members
        write(model, start)
        predicted = self.indicator(model, parameter)
        if self.train is not None:
            trained = copy.deepcopy(model)  # `train` may also change modes and tensors that all members share
            coordinates = trainable(trained)
            self.train(trained, argument(parameter))
            write(model, _flat(coordinates))
        elif self.terms_of is not None:
            steps = take_steps(model, list(self.terms_of(argument(parameter))), self.steps, self.max_steps)
        vector, indicator = read(model), self.indicator(model, parameter)
        has_loss = self.terms_of is not None or self.loss_of is not None
        if not np.isfinite(vector).all() or (has_loss and not math.isfinite(indicator)):
            raise ValueError(
                f"The fitted member has NaN or infinite coordinates or residuals; its loss is {indicator}."
            )
        return Member(parameter, vector, predicted, indicator, steps, time.perf_counter() - began)

    def indicator(self, model: nn.Module, parameter: Point) -> float:
        """The loss of `loss_of`, or else the root of the loss of the terms; NaN without either."""
        if self.loss_of is not None:
            with torch.no_grad():
                return float(self.loss_of(model, argument(parameter)))
        if self.terms_of is None:
            return math.nan
        return residuals_of(model, self.terms_of(argument(parameter))).norm().item()


def argument(point: Point) -> float | Point:
    """The parameter as functions of the user get it: a number if there is only one."""
    return point[0] if len(point) == 1 else point


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are the coordinates of a member."""
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def read(model: nn.Module) -> np.ndarray:
    """The coordinates (P,) of a model, in float64."""
    return _flat(trainable(model))


def _flat(parts: Mapping[str, Tensor]) -> np.ndarray:
    return torch.cat([part.detach().double().cpu().flatten() for part in parts.values()]).numpy()


@torch.no_grad()
def write(model: nn.Module, vector: np.ndarray) -> None:
    """Gives a model the coordinates (P,)."""
    for part, value in zip(trainable(model).values(), named(model, vector).values(), strict=True):
        part.copy_(value)


def named(model: nn.Module, vector: np.ndarray) -> dict[str, Tensor]:
    """The coordinates (P,) as tensors by the name of the parameter that each replaces."""
    parts = trainable(model)
    values = torch.from_numpy(vector).split([part.numel() for part in parts.values()])
    return {name: value.view_as(part).to(part) for (name, part), value in zip(parts.items(), values, strict=True)}


@torch.no_grad()
def residuals_of(model: nn.Module, terms: Iterable) -> Tensor:
    """The residuals (M,) of terms in float64, whose sum of squares is the loss of `LevenbergMarquardt`."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exact = {n: t.double() for n, t in state.items() if t.is_floating_point() and t.dtype != torch.float64}
    parts = []
    for function, rows, weight in check_terms(terms):
        rows = tuple(row.double() if row.is_floating_point() else row for row in rows)
        values = call_with_parameters(model, exact, partial(function, model), rows, {})
        parts.append(math.sqrt(weight / len(rows[0])) * values.double().flatten())
    return torch.cat(parts)


def take_steps(model: nn.Module, terms: Sequence, least: int, most: int) -> int:
    """Takes Levenberg-Marquardt steps: `least`, and more while the loss halves. Returns their number."""
    optimizer = LevenbergMarquardt(model, DAMPING, floor=1.0)
    for number in range(1, most + 1):
        record = optimizer.step(terms)
        if not record.accepted or (number >= least and record.decrease < 0.5):
            return number
        optimizer.damping = max(optimizer.damping, DAMPING)
    return most


def fit_all(
    model: nn.Module, problem: Problem, starts: Mapping[Point, np.ndarray], executor: Executor | None
) -> Iterator[tuple[Point, Member | str]]:
    """Yields each parameter of `starts` with its fitted member, or with the error of a function of the user."""
    fits = map if executor is None else executor.map
    return zip(starts, fits(partial(_attempt, model, problem), starts, starts.values()), strict=True)


def _attempt(model: nn.Module, problem: Problem, parameter: Point, start: np.ndarray) -> Member | str:
    try:
        return problem.fit(model, parameter, start)
    except Exception as error:  # as text, since errors of users need not be picklable
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} (line {place.lineno} of {place.filename})"
