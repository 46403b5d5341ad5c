# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One member of a family: its fit, in this process or another one, and its loss."""

from __future__ import annotations

import math
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..modules.calls import call_with_parameters
from ..optim.least_squares import check_terms, name_term
from ..optim.levenberg_marquardt import LevenbergMarquardt


Point = tuple[float, ...]

# The damping of all steps, as a share of the largest diagonal entry of J^T J. Directions in which the residuals hardly
# change are not moved by it, so that members stay comparable: docs/notes/parametric.md.
DAMPING = 1e-6


_DEATHS = ("KilledWorker", "CommClosedError")  # of Dask, which gives up after several deaths


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
    """What a family is fitted to; `argument` is what its functions are called with.

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
        """Fits the trainable parameters of a model, from `start`."""
        began = time.perf_counter()
        write(model, start)
        predicted, steps = self.indicator(model, parameter), 0
        if self.train is not None:
            with _frozen_parts_kept(model):
                self.train(model, argument(parameter))
        elif self.terms_of is not None:
            steps = take_steps(model, list(self.terms_of(argument(parameter))), self.steps, self.max_steps)
        vector = read(model)
        if not np.isfinite(vector).all():
            raise ValueError("The fitted parameters are not finite.")
        indicator = self.indicator(model, parameter)
        if not math.isfinite(indicator) and (self.terms_of is not None or self.loss_of is not None):
            raise ValueError(f"The loss of the fitted member is {indicator}: residuals are NaN or infinite.")
        return Member(parameter, vector, predicted, indicator, steps, time.perf_counter() - began)

    def indicator(self, model: nn.Module, parameter: Point) -> float:
        """The loss of `loss_of`, or else the root of the loss of the terms; NaN without either."""
        if self.loss_of is not None:
            with torch.no_grad():
                return float(self.loss_of(model, argument(parameter)))
        if self.terms_of is None:
            return math.nan
        return residuals_of(model, self.terms_of(argument(parameter))).norm().item()


@contextmanager
def _frozen_parts_kept(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode at the end, and refuses changes of what all members share: its other tensors
    are put back then."""
    coordinates = trainable(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shared = {name: (part, part.detach().clone()) for name, part in state.items() if name not in coordinates}
    try:
        yield
    finally:
        model.eval()
        for name, part in model.named_parameters():
            part.requires_grad_(name in coordinates)
        changed = [name for name, (part, before) in shared.items() if not torch.equal(part, before)]
        with torch.no_grad():
            for name in changed:
                shared[name][0].copy_(shared[name][1])
    if changed:
        raise ValueError(
            f"`train` changed {', '.join(changed[:4])}, which all members of the family share. Train the parameters "
            "that require a gradient, and leave the model in evaluation mode if it has running statistics."
        )


def argument(parameter: Point) -> float | Point:
    """A parameter as functions of the user get it: a number if there is only one."""
    return parameter[0] if len(parameter) == 1 else parameter


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are the coordinates of a member."""
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def read(model: nn.Module) -> np.ndarray:
    """The coordinates (P,) of a model, in float64."""
    return torch.cat([part.detach().double().cpu().flatten() for part in trainable(model).values()]).numpy()


@torch.no_grad()
def write(model: nn.Module, vector: np.ndarray) -> None:
    """Gives a model the coordinates (P,)."""
    for part, value in zip(*_split(model, vector), strict=True):
        part.copy_(value)


def _split(model: nn.Module, vector: np.ndarray) -> tuple[list[nn.Parameter], list[Tensor]]:
    parts = list(trainable(model).values())
    values = torch.from_numpy(np.ascontiguousarray(vector)).split([part.numel() for part in parts])
    return parts, [value.view_as(part) for value, part in zip(values, parts, strict=True)]


def named(model: nn.Module, vector: np.ndarray) -> dict[str, Tensor]:
    """The coordinates (P,) as the parameters of a model that they stand for, by name."""
    values = (value.to(part) for part, value in zip(*_split(model, vector), strict=True))
    return dict(zip(trainable(model), values, strict=True))


@torch.no_grad()
def residuals_of(model: nn.Module, terms: Iterable) -> Tensor:
    """The residuals (M,) of terms, scaled so that the sum of their squares is the loss of `LevenbergMarquardt`; in
    float64, whatever the dtype of the model."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exact = {n: t.double() for n, t in state.items() if t.is_floating_point() and t.dtype != torch.float64}
    parts = []
    for index, (function, rows, weight) in enumerate(check_terms(terms)):
        rows = tuple(row.double() if row.is_floating_point() else row for row in rows)
        values = call_with_parameters(model, exact, partial(function, model), rows, {})
        if not isinstance(values, Tensor) or values.shape[:1] != (len(rows[0]),):
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"The {name_term(index, function)} returns {given} for {len(rows[0])} rows, but must return "
                f"({len(rows[0])},) or ({len(rows[0])}, m): the residuals of each row, without a mean over rows."
            )
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


class Failure(NamedTuple):
    """A parameter whose fit raised an error."""

    parameter: Point
    error: str


def fit_all(
    model: nn.Module, problem: Problem, jobs: Sequence[tuple[Point, np.ndarray]], executor: Executor | None
) -> Iterator[Member | Failure]:
    """Fits members, each from its start, and yields them as they are done.

    Raises:
        RuntimeError: The workers of the executor died.
        ValueError: The model or a function cannot be sent to another process.
    """
    if executor is None:
        for parameter, start in jobs:
            yield _attempt(model, problem, parameter, start)
        return
    content = _pickled(model, problem)
    try:
        futures = {executor.submit(fit_pickled, content, *job): job for job in jobs}
        for future in as_completed(futures):
            result = future.result()
            yield (Member if len(result) == len(Member._fields) else Failure)._make(result)
    except Exception as error:
        if not isinstance(error, BrokenExecutor) and type(error).__name__ not in _DEATHS:
            raise
        raise RuntimeError(
            "The workers of `executor` died (out of memory?). With `folder`, what was fitted is kept: call `fit` "
            "again with the same folder and a new executor, and nothing is fitted twice."
        ) from error


def fit_pickled(content: bytes, parameter: Point, start: np.ndarray) -> tuple:
    """Fits one member in a worker; the result is plain values, since errors of users need not be picklable."""
    model, problem = pickle.loads(content)
    return tuple(_attempt(model, problem, parameter, start))


def _attempt(model: nn.Module, problem: Problem, parameter: Point, start: np.ndarray) -> Member | Failure:
    try:
        return problem.fit(model, parameter, start)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(parameter, f"{type(error).__name__}: {error} (line {place.lineno} of {place.filename})")


def _pickled(model: nn.Module, problem: Problem) -> bytes:
    try:
        return pickle.dumps((model, problem))
    except Exception as error:
        try:
            import cloudpickle  # which Dask brings
        except ImportError:
            raise ValueError(
                f"The model, or a function of the family, cannot be sent to another process: {error}. Define "
                "functions at the top level of a module, or install cloudpickle."
            ) from error
        return cloudpickle.dumps((model, problem))
