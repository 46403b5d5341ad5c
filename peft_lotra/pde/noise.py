# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Data with noise beside an equation: the weights of the data, and the standard errors of constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..least_squares.normal_equations import LinearModel
from ..least_squares.problem import LeastSquares
from .boxes import box_points
from .training import Training
from .unknowns import Estimate


DAMPING = 1e-12  # of the normal equations for errors
PASSES = 2  # the variance of the noise depends on the leverages, and they on the variance
LEAST_FREEDOM = 0.5  # of a column of data
MOST_UNSURE = 1e3  # errors of a constant, as multiples of it
LEAST_MOVE = 1e-3  # as a share, which needs no word
MOST_ERRORS, MOST_MOVE = 3.0, 0.3  # by which constants are corrected: in errors, and as a share
LEAST_EFFECT = 1e-14  # of a combination of constants: the square, as a share of the largest


def check_effects(training: Training) -> None:
    """Raise a `ValueError` if a constant has no effect on the residuals."""
    module: Any = training.constants
    problem, residuals = training.evaluate_held()
    gradient = problem.pull_back(torch.ones_like(residuals).cumsum(0).cos())
    for name, derivative in zip(module.names, gradient[-len(module.names) :].tolist(), strict=True):
        if derivative == 0:
            raise ValueError(
                f"`unknowns` has {name!r}, but no residual depends on it at its start. Use the tensor as it is "
                "(`float` and `.item()` cut it off), or start from another value."
            )


def estimate(training: Training) -> tuple[dict[str, Estimate], list[str]]:
    """Return the constants, corrected by the data, with their standard errors, and what has not converged.

    J has a row for each residual divided by its scale s, and a column for each parameter of the network and constant.
    Y are the rows of the data in the projection of the constants' columns on the complement of the network's: the
    effects of the constants with a network that follows them. (Y^T Y)^-1 is the covariance. Rows of the equation do
    not count: their residuals are no noise, but what the network cannot represent. They also hold back the constants
    in training, so that -(Y^T Y)^-1 Y^T r, with the residuals r of the data, is added to these.

    The variance s^2 of a column of n data is their sum of squares over n - sum h, with the leverages h, the diagonal
    of J (J^T J)^-1 J^T. It is unknown unless there are more data than constants.
    """
    module: Any = training.constants
    count = len(module.names)
    weights = [function.scale for function, *_ in training.terms]
    held, held_residuals = training.evaluate_held()
    of_equation, *_ = held.losses(held_residuals)
    for function, *_ in training.terms:
        function.scale = None
    problem, conditions = _problem_with_plain_data(training, held.terms[0].columns, of_equation)
    residuals = problem.residuals(problem.start)
    data = problem.terms[conditions:]
    jacobian = torch.cat(
        [residuals.new_empty(0, problem.num_parameters), *(problem.jacobian(t, t.rows) for t in data)]
    )
    for (function, *_), weight in zip(training.terms, weights, strict=True):
        function.scale = weight
    noise = _number_columns(data)
    of_points, of_data = residuals.tensor_split([len(residuals) - len(jacobian)])
    problem.terms = problem.terms[:conditions]
    linear = LinearModel(problem, of_points, DAMPING, in_parameter_space=True)
    of_collocation = linear.matrix

    units = torch.eye(problem.num_parameters, dtype=torch.float64, device=jacobian.device)[:, -count:]
    rest, leverages = of_data, torch.zeros_like(of_data)
    for _ in range(PASSES):
        freedom = torch.bincount(noise, 1 - leverages)
        variances = torch.bincount(noise, rest.square()) / freedom.clamp(min=LEAST_FREEDOM)
        variances = variances.where(torch.bincount(noise) > count, math.inf)
        scales = variances.clamp(min=1e-300).sqrt()[noise]
        scaled = jacobian / scales.unsqueeze(1)
        linear.matrix = of_collocation + scaled.T @ scaled
        solution = _solve(linear, torch.cat([units, scaled.T], 1))
        if solution is None:
            unknown = {name: Estimate(value.item(), math.inf) for name, value in module.values().items()}
            return unknown, ["The errors of `unknowns` are not known: derivatives of a residual are not finite."]
        leverages = (scaled * solution[:, count:].T).sum(1)
        moves = solution[:, :count] @ torch.linalg.pinv(solution[-count:, :count])
        shift, errors = _regress(scaled @ moves, of_data / scales)
        rest = of_data - jacobian @ moves @ shift
    estimates, doubts = {}, []
    for name, constant, change, error in zip(module.names, module.constants, shift, errors, strict=True):
        value, slope = constant().item(), constant.slope()
        move, error = -slope * change.item(), abs(slope * error.item())
        if error > MOST_UNSURE * (abs(value) or 1.0):
            doubts.append(f"The error of {name!r} in `unknowns` is not known: the data do not tell it. Give more.")
        is_small = abs(move) <= LEAST_MOVE * abs(value)
        if is_small or abs(move) <= min(MOST_ERRORS * error, MOST_MOVE * abs(value)):
            value = min(max(value + move, constant.low), constant.high)
        elif not constant.low < value + move < constant.high:
            doubts.append(f"{name!r} of `unknowns` ends at its bound. Give wider `bounds`.")
        elif MOST_ERRORS * error < abs(move):
            doubts.append(
                f"{name!r} of `unknowns` has not converged: the data would move it by {move:.2g}, which is more than "
                f"its error. Give more `seconds`, or start nearer than {constant.start:g}."
            )
        estimates[name] = Estimate(value, error)
    return estimates, doubts


def _problem_with_plain_data(training: Training, columns: int, of_equation: float) -> tuple[LeastSquares, int]:
    """Return a problem with rows of the equation over their scale, twice as many as parameters, and plain data.

    Terms with a weight are conditions, as the equation is, if there are terms without one. The equation and the
    conditions are first; their number is returned too.
    """
    low, high = training.sampler.low.tolist(), training.sampler.high.tolist()
    size = sum(parameter.numel() for parameter in training.optimizer.model.parameters())
    count = 2 * size // columns + 1
    points = box_points(low, high, count, inside=training.sampler.inside, seed=training.sampler.seed)
    points.requires_grad_(training.differentiates)
    weight = len(points) * columns / max(of_equation, 1e-300)
    terms: list[Any] = [(training.residual, (points, torch.ones_like(points[:, :1])), weight)]
    conditions = [term for term in training.terms if training.data and term[0] not in training.data]
    data = [term for term in training.terms if not training.data or term[0] in training.data]
    terms += [(function, rows, weight * of_term) for function, rows, of_term in conditions]
    terms += [(function, rows, len(rows[0])) for function, rows, _ in data]
    return training.optimizer.evaluate_held(terms)[0], 1 + len(conditions)


def _number_columns(terms: list[Any]) -> Tensor:
    """Return the number of the column of each residual, counted through all terms."""
    numbers, first = [torch.empty(0, dtype=torch.long)], 0
    for term in terms:
        numbers.append(torch.arange(first, first + term.columns).repeat(len(term.rows[0])))
        first += term.columns
    return torch.cat(numbers)


def _solve(linear: LinearModel, columns: Tensor) -> Tensor | None:
    """Solve the normal equations with as little damping as rounding allows; None if no damping does."""
    damping = DAMPING
    while damping < 1:
        solution = linear.inverse(damping, columns)
        if solution is not None:
            return solution
        damping *= 10
    return None


def _regress(effects: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of effects (n, k) in residuals of unit variance, and their standard errors.

    Combinations without an effect get the coefficient 0 and a huge error.
    """
    sizes = effects.norm(dim=0).clamp(min=1e-150)
    unit = effects / sizes
    values, vectors = torch.linalg.eigh(unit.T @ unit)
    inverse = (1 / values).where(values > LEAST_EFFECT, 0.0)
    coefficients = vectors @ (inverse * (vectors.T @ (unit.T @ residuals)))
    errors = (vectors.square() @ (1 / values.clamp(min=LEAST_EFFECT))).sqrt()
    return coefficients / sizes, errors / sizes
