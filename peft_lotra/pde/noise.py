# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The estimation of unknown constants from noisy data: the weights of the data, and the standard errors."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..least_squares.normal_equations import LinearModel
from ..least_squares.problem import LeastSquares
from .boxes import spread_points
from .training import Training
from .unknowns import BoundFunction, Constant, Estimate, NetworkWithConstants


DAMPING = 1e-13  # of the normal equations
PASSES = 3  # the variances of columns depend on the moves, and they on the variances
LEAST_FREEDOM = 0.5  # of a column of data
EXACT = 1e2  # the factor of the equation's squares, which makes it nearly exact in the normal equations
ROUNDS = 3  # corrections of the constants; the first one starts from a network that has followed the noise
CONVERGED = 0.1  # a later correction, as a share of the error, after which no other one is needed
MOST_UNSURE = 1e3  # errors of a constant, as multiples of it
LEAST_MOVE = 1e-3  # as a share, which needs no word
MOST_ERRORS = 3.0  # the last move, as a multiple of the error, beyond which a constant has not converged
MOST_MOVE = 0.3  # as a share of the constant
FITTED, SETTLED = 0.5, 0.95  # the shares of the budget between which constants and the network alternate
LIGHTER = 1e-4  # the factor of the data's weights then
FIRST_WEIGHT = 10.0  # of data, as a multiple of the equation's mean square over theirs
FIXED = 0.1  # the share of a fit for the equation, and then with data, before constants are trained
ROBUST = 0.45  # after which outliers of the equation count less
HEAVY = 0.65  # after which data are light
LIGHT = 0.01  # the factor of the weights then
LEAST_EFFECT = 1e-14  # of a combination of constants: the square, as a share of the largest


@dataclass
class Estimation:
    """The estimation of unknown constants, beside the training of the network.

    Attributes:
        training: The training, of the network with constants.
        module: The network with constants.
        data: The functions of terms whose weights follow from their noise, see `fit`.
    """

    training: Training
    module: NetworkWithConstants
    data: Collection[BoundFunction]

    def __post_init__(self) -> None:
        """Let steep places count in full: a network with steps there would solve the equation of other constants."""
        self.training.weighs_slopes = False
        self.share = self.training.sampler.share

    def check_effects(self) -> None:
        """Raise a `ValueError` if a constant has no effect on the residuals."""
        problem, residuals = self.training.evaluate_held()
        weights = torch.ones_like(residuals).cumsum(0).cos()
        gradient = problem.pull_back(weights)
        names = self.module.names
        derivatives = gradient[-len(names) :].tolist()
        for name, derivative in zip(names, derivatives, strict=True):
            if derivative == 0:
                raise ValueError(
                    f"`unknowns` has {name!r}, but no residual depends on it at its start. Use the tensor as it is "
                    "(`float` and `.item()` cut it off), or start from another value."
                )

    def fit(self, name: str, until: float) -> float:
        """As `Training.fit_on`: the equation at the first constants, heavy data, then constants too, then light data.

        From a random network, constants would follow whatever it is, to an end of their interval perhaps. With heavy
        data the network cannot stay away from them. With light data the equation holds as if there were no noise.
        Where the network cannot solve the equation, at a corner perhaps, its residual would bend the constants:
        outliers count less and less.
        """
        training = self.training
        if all(function.scale is not None for function in self.data):  # no data, or not for the first time
            return training.fit_on(name, until)

        # the equation alone, and then with data, before constants are trained
        self._set_weights()
        terms = training.terms
        training.terms = []
        self._fit_network("fixed constants", FIXED * until)
        training.terms = terms
        self._fit_network("fixed constants", 2 * FIXED * until)
        for share, robustness in ((ROBUST, 0.5), (HEAVY, 1.0)):
            if training.allows_step(share * until):
                training.fit_on("heavy data", share * until)
            self._set_robustness(robustness)
        self._scale_data(LIGHT)
        return training.fit_on(name, until)

    def estimate(self) -> tuple[dict[str, Estimate], list[str]]:
        """Estimate the constants with their standard errors, and say which have not converged.

        Trained together with the network, constants follow the noise: a network that bends to the data only has to
        break the equation a little. Here they alternate. The network solves the equation at fixed constants; then the
        data move the constants, by a step of Gauss-Newton that holds the equation. At the end, the network solves the
        equation at the estimates.
        """
        module = self.module
        self._set_robustness(0.0)
        self._scale_data(LIGHTER)
        estimates, doubts = self._alternate()
        values = {name: estimate.value for name, estimate in estimates.items()}
        module.assign(values)
        self._fit_network("estimated constants", 1.0)
        return estimates, doubts

    def _alternate(self) -> tuple[dict[str, Estimate], list[str]]:
        """Train the network and move the constants in turn."""
        module: Any = self.module
        moves: list[float] = []
        errors: list[float] = []
        for number in range(ROUNDS):
            if moves:
                values = {}
                for name, constant, move in zip(module.names, module.constants, moves, strict=True):
                    values[name] = _moved(constant, move, reach=0.5)
                module.assign(values)
            share = (number + 1) / ROUNDS
            until = FITTED + (SETTLED - FITTED) * share
            self._fit_network("fixed constants", until)
            correction = self._correct()
            if correction is None:
                doubt = "The errors of `unknowns` are not known: derivatives of a residual are not finite."
                return module.estimates(math.inf), [doubt]
            moves, errors = correction
            pairs = zip(moves, errors, strict=True)
            has_converged = all(abs(move) <= CONVERGED * error for move, error in pairs)
            if (number and has_converged) or self.training.budget.is_stopped:
                break

        estimates = {}
        doubts = []
        for name, constant, move, error in zip(module.names, module.constants, moves, errors, strict=True):
            estimates[name], doubt = _judge(name, constant, move, error)
            doubts += doubt
        return estimates, doubts

    def _fit_network(self, name: str, until: float) -> None:
        """Train the network, with fixed constants."""
        training = self.training
        if not training.allows_step(until):
            return
        self.module.constants.requires_grad_(False)
        training.restart_optimizer()
        training.fit(name, until)
        self.module.constants.requires_grad_(True)
        training.optimizer.forget()

    def _set_weights(self) -> None:
        """Give each column of data the mean square of the equation's residual, times `FIRST_WEIGHT`."""
        problem, residuals = self.training.evaluate_held()
        of_equation, *_ = problem.losses(residuals)
        for term, residuals_of_term in zip(problem.terms, problem.split(residuals), strict=True):
            if term.function in self.data:
                rows = (residuals_of_term / term.scale).view(-1, term.columns)
                mean_squares = rows.square().mean(0)
                weights = (FIRST_WEIGHT * of_equation / mean_squares).clamp(1e-12, 1e12)
                term.function.scale = weights.sqrt()  # pyright: ignore[reportFunctionMemberAccess]

    def _scale_data(self, factor: float) -> None:
        """Multiply the weights of the data, and forget former residuals, which had others."""
        for function in self.data:
            function.scale = factor**0.5 * function.scale
        self.training.restart_optimizer()

    def _set_robustness(self, robustness: float) -> None:
        """Let outliers of the equation count less, and points not follow them; by 0 as at first."""
        self.training.robustness = robustness
        self.training.sampler.share = 0.0 if robustness else self.share

    def _correct(self) -> tuple[list[float], list[float]] | None:
        """Return by how much the data would move the constants, and their standard errors; None if J is not finite.

        J has a row for each residual divided by its scale, and a column for each parameter and constant. Rows of the
        equation are heavy, so that the network follows the equation, and not the noise. First the network
        alone takes a step of Gauss-Newton to the solution of the equation.

        Y are the rows of the data in the projection of the constants' columns on the complement of the network's: the
        effects of the constants with a network that follows them. The move is -(Y^T Y)^-1 Y^T r, with the residuals r
        of the data after the network's step, and (Y^T Y)^-1 is the covariance. Rows of the equation do not count
        there: their residuals are no noise, but errors of the network.

        See `_regress_columns` for the noise, with the diagonal of J (J^T J)^-1 J^T as the leverages.
        """
        module: Any = self.module
        count = len(module.names)
        problem, conditions = self._problem_of_noise()
        residuals = problem.residuals(problem.start)
        jacobians = [residuals.new_empty(0, problem.num_parameters)]
        numbers = [torch.empty(0, dtype=torch.long)]
        first = 0
        for term in problem.terms[conditions:]:
            jacobians.append(problem.jacobian(term, term.rows))
            last = first + term.columns
            numbers.append(torch.arange(first, last).repeat(len(term.rows[0])))
            first = last
        jacobian = torch.cat(jacobians)
        columns = torch.cat(numbers)  # of data, counted through all terms

        # the linear model of the equation and the conditions
        of_points, of_data = residuals.tensor_split([len(residuals) - len(jacobian)])
        problem.terms = problem.terms[:conditions]
        linear = LinearModel(problem, of_points, DAMPING, in_parameter_space=True)

        # the equation outweighs the data, also where these are exact
        mean_squares = torch.bincount(columns, of_data.square()) / torch.bincount(columns)
        sizes = mean_squares.clamp(min=1e-300).sqrt()
        scaled = jacobian / sizes[columns].unsqueeze(1)
        linear.matrix = EXACT * linear.matrix + scaled.T @ scaled
        linear.scaling = linear.matrix.diagonal().clamp(min=1e-300)

        # one factorization serves the projection, the leverages and the step
        identity = torch.eye(problem.num_parameters, dtype=jacobian.dtype, device=jacobian.device)
        units = identity[:, -count:]
        gradient = EXACT * linear.gradient.unsqueeze(1)
        solution = _solve(linear, torch.cat([units, scaled.T, gradient], 1))
        if solution is None or not solution.isfinite().all():
            return None
        of_units, of_rows, of_gradient = solution.tensor_split([count, count + len(scaled)], dim=1)
        followed = of_units @ torch.linalg.pinv(of_units[-count:])

        # at fixed constants, the step of the equation
        step = followed @ of_gradient[-count:] - of_gradient
        solved = of_data + jacobian @ step.squeeze(1)

        effects = jacobian @ followed
        leverages = (scaled * of_rows.T).sum(1)
        moves, errors = _regress_columns(effects, solved, leverages, columns)
        # from the trained parameters z of the constants to the constants
        slopes = torch.tensor([constant.slope() for constant in module.constants], dtype=torch.float64)
        moves = slopes * moves.cpu()
        errors = slopes.abs() * errors.cpu()
        return moves.tolist(), errors.tolist()

    def _problem_of_noise(self) -> tuple[LeastSquares, int]:
        """Return a problem with rows of the equation over their scale, twice as many as parameters, and the data.

        Terms with a weight are conditions, as the equation is, if there are terms without one. The equation and the
        conditions are first; their number is returned too.
        """
        training = self.training
        held, held_residuals = training.evaluate_held()
        of_equation, *_ = held.losses(held_residuals)
        columns = held.terms[0].columns
        count = 2 * held.num_parameters // columns + 1
        sampler = training.sampler
        points = spread_points(sampler.low, sampler.high, count, sampler.inside, sampler.seed)
        points.requires_grad_(training.differentiates)

        weight = len(points) * columns / max(of_equation, 1e-300)
        rows = (points, training.weights(points))
        conditions: list[Any] = [(training.residual, rows, weight)]
        data = []
        for term in training.terms:
            function, rows, of_term = term
            if self.data and function not in self.data:
                conditions.append((function, rows, weight * of_term))
            else:
                data.append(term)
        problem, _ = training.optimizer.evaluate_held([*conditions, *data])
        return problem, len(conditions)


def _moved(constant: Constant, move: float, reach: float) -> float:
    """Return a constant after a move by a share of it at most, and at most a share `reach` of the way to a bound."""
    value = constant().item()
    most = MOST_MOVE * constant.size
    lowest = max(-most, reach * (constant.low - value))
    highest = min(most, reach * (constant.high - value))
    moved = value + min(max(move, lowest), highest)
    return min(max(moved, constant.low), constant.high)  # rounding may pass a bound


def _judge(
    name: str,
    constant: Constant,
    move: float,
    error: float,
) -> tuple[Estimate, list[str]]:
    """Return the estimate after the last move, which counts as an error too, and what is doubtful about it."""
    value = constant().item()
    size = constant.size
    doubts = []
    is_sure = error <= MOST_UNSURE * size
    if not is_sure:  # NaN, too: at an end of its interval, a constant has no effect
        doubts.append(f"The error of {name!r} in `unknowns` is not known: the data do not tell it. Give more.")
        error = math.inf
    is_small = abs(move) <= LEAST_MOVE * size
    if not constant.low < value + move < constant.high and not is_small:
        doubts.append(f"{name!r} of `unknowns` ends at its bound. Give it a wider interval.")
    elif abs(move) > MOST_ERRORS * error and not is_small:
        doubts.append(
            f"{name!r} of `unknowns` has not converged: the data still move it by {move:.2g}, which is more than its "
            f"error. Give more `seconds`, or start nearer than {constant.start:g}."
        )
    estimate = Estimate(_moved(constant, move, reach=1.0), math.hypot(error, move))
    return estimate, doubts


def _solve(linear: LinearModel, columns: Tensor) -> Tensor | None:
    """Solve the normal equations with as little damping as rounding allows; None if no damping does."""
    damping = DAMPING
    while damping < 1:
        solution = linear.inverse(damping, columns)
        if solution is not None:
            return solution
        damping *= 10
    return None


def _regress_columns(
    effects: Tensor,
    residuals: Tensor,
    leverages: Tensor,
    columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `_regress`, of residuals whose variance is that of their column.

    The variance of a column of n data is the sum of squares after the moves over n - sum h, with the leverages h. It
    is unknown unless there are more data than effects.
    """
    counts = torch.bincount(columns)
    freedom = torch.bincount(columns, 1 - leverages).clamp(min=LEAST_FREEDOM)
    count = effects.shape[1]
    moves = errors = effects.new_zeros(count)
    for _ in range(PASSES):
        misfit = residuals + effects @ moves
        variances = torch.bincount(columns, misfit.square()) / freedom
        variances = variances.where(counts > count, math.inf)
        noise = variances.clamp(min=1e-300).sqrt()
        noise = noise[columns]
        moves, errors = _regress(effects / noise.unsqueeze(1), residuals / noise)
    return moves, errors


def _regress(effects: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moves by effects (n, k) that lower residuals of unit variance the most, and their standard errors.

    Combinations without an effect do not move, and get a huge error.
    """
    sizes = effects.norm(dim=0).clamp(min=1e-150)
    unit = effects / sizes
    moves = -torch.linalg.pinv(unit, rtol=LEAST_EFFECT**0.5) @ residuals
    values, vectors = torch.linalg.eigh(unit.T @ unit)

    covariance = 1 / values.clamp(min=LEAST_EFFECT)
    errors = (vectors.square() @ covariance).sqrt()
    return moves / sizes, errors / sizes
