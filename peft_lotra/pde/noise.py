# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Noisy data of an equation: the weights of the data, and the standard errors of constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..least_squares.normal_equations import LinearModel
from ..least_squares.problem import LeastSquares
from .boxes import box_points
from .training import Training
from .unknowns import Constant, Estimate


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
    """Return the constants, corrected by the data, with their standard errors, and what has not converged."""
    module: Any = training.constants
    correction = _correct(training)
    estimates, doubts = {}, []
    if correction is None:
        for name, value in module.values().items():
            estimates[name] = Estimate(value.item(), math.inf)
        return estimates, ["The errors of `unknowns` are not known: derivatives of a residual are not finite."]
    for name, constant, move, error in zip(module.names, module.constants, *correction, strict=True):
        slope = constant.slope()
        change = -slope * move.item()
        estimates[name], doubt = _judge(name, constant, change, abs(slope * error.item()))
        doubts += doubt
    return estimates, doubts


def _judge(name: str, constant: Constant, move: float, error: float) -> tuple[Estimate, list[str]]:
    """Move a constant as far as the data ask for, unless that is too far to be linear."""
    value = constant().item()
    size = abs(value)
    doubts = []
    if error > MOST_UNSURE * (size or 1.0):
        doubts.append(f"The error of {name!r} in `unknowns` is not known: the data do not tell it. Give more.")
        error = math.inf
    is_small = abs(move) <= LEAST_MOVE * size
    if is_small or abs(move) <= min(MOST_ERRORS * error, MOST_MOVE * size):
        value = min(max(value + move, constant.low), constant.high)
    elif not constant.low < value + move < constant.high:
        doubts.append(f"{name!r} of `unknowns` ends at its bound. Give wider `bounds`.")
    elif abs(move) > MOST_ERRORS * error:
        doubts.append(
            f"{name!r} of `unknowns` has not converged: the data would move it by {move:.2g}, which is more than "
            f"its error. Give more `seconds`, or start nearer than {constant.start:g}."
        )
    return Estimate(value, error), doubts


def _correct(training: Training) -> tuple[Tensor, Tensor] | None:
    """Return by how much data would move the constants, and their standard errors; None if J is not finite.

    J has a row for each residual divided by its scale s, and a column for each parameter of the network and constant.
    Y are the rows of the data in the projection of the constants' columns on the complement of the network's: the
    effects of the constants with a network that follows them. (Y^T Y)^-1 is the covariance. Rows of the equation do
    not count: their residuals are no noise, but errors of the network. They also hold back the constants
    in training, and -(Y^T Y)^-1 Y^T r, with the residuals r of the data, corrects these.

    The variance s^2 of a column of n data is their sum of squares over n - sum h, with the leverages h, the diagonal
    of J (J^T J)^-1 J^T. It is unknown unless there are more data than constants.
    """
    module: Any = training.constants
    count = len(module.names)
    problem, conditions = _problem_with_plain_data(training)
    scales = [function.scale for function, *_ in training.terms]
    for function, *_ in training.terms:
        function.scale = None
    residuals = problem.residuals(problem.start)
    data = problem.terms[conditions:]
    no_rows = residuals.new_empty(0, problem.num_parameters)
    jacobian = torch.cat([no_rows, *(problem.jacobian(term, term.rows) for term in data)])
    for (function, *_), scale in zip(training.terms, scales, strict=True):
        function.scale = scale

    of_points, of_data = residuals.tensor_split([len(residuals) - len(jacobian)])
    problem.terms = problem.terms[:conditions]
    linear = LinearModel(problem, of_points, DAMPING, in_parameter_space=True)
    of_collocation = linear.matrix
    columns = _number_columns(data)
    units = torch.eye(problem.num_parameters, dtype=torch.float64, device=jacobian.device)[:, -count:]
    misfit, leverages = of_data, torch.zeros_like(of_data)
    for _ in range(PASSES):
        freedom = torch.bincount(columns, 1 - leverages).clamp(min=LEAST_FREEDOM)
        variances = torch.bincount(columns, misfit.square()) / freedom
        variances = variances.where(torch.bincount(columns) > count, math.inf)
        noise = variances.clamp(min=1e-300).sqrt()[columns]
        scaled = jacobian / noise.unsqueeze(1)
        linear.matrix = of_collocation + scaled.T @ scaled
        solution = _solve(linear, torch.cat([units, scaled.T], 1))
        if solution is None:
            return None
        leverages = (scaled * solution[:, count:].T).sum(1)
        moves = solution[:, :count] @ torch.linalg.pinv(solution[-count:, :count])
        shift, errors = _regress(scaled @ moves, of_data / noise)
        misfit = of_data - jacobian @ moves @ shift
    return shift, errors


def _problem_with_plain_data(training: Training) -> tuple[LeastSquares, int]:
    """Return a problem with rows of the equation over their scale, twice as many as parameters, and plain data.

    Terms with a weight are conditions, as the equation is, if there are terms without one. The equation and the
    conditions are first; their number is returned too.
    """
    held, held_residuals = training.evaluate_held()
    of_equation, *_ = held.losses(held_residuals)
    columns = held.terms[0].columns
    low, high = training.sampler.low.tolist(), training.sampler.high.tolist()
    size = sum(parameter.numel() for parameter in training.optimizer.model.parameters())
    count = 2 * size // columns + 1
    points = box_points(low, high, count, inside=training.sampler.inside, seed=training.sampler.seed)
    points.requires_grad_(training.differentiates)
    weight = len(points) * columns / max(of_equation, 1e-300)
    conditions: list[Any] = [(training.residual, (points, training.weights(points)), weight)]
    data = []
    for function, rows, of_term in training.terms:
        if training.data and function not in training.data:
            conditions.append((function, rows, weight * of_term))
        else:
            data.append((function, rows, len(rows[0])))
    return training.optimizer.evaluate_held([*conditions, *data])[0], len(conditions)


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
