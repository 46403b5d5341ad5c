# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The linear model of a least-squares problem, and its damped solutions."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor

from .least_squares import LeastSquares


class LinearModel:
    """The linear model r + J step around the parameters, in the smaller space of P parameters or M residuals.

    Raises a ValueError if the matrix does not fit into the memory of the problem."""

    in_residual_space: bool
    jacobian: Tensor | None  # J, (M, P), if it fits into half of the memory
    matrix: Tensor  # J^T J, (P, P), or J S^-1 J^T, (M, M)
    scaling: Tensor  # S, the diagonal of J^T J, (P,); at least `floor` times its largest entry
    gradient: Tensor  # J^T r, (P,)
    past: tuple[Tensor, Tensor] | None  # J^T J and J^T r of former residuals, at the parameters; they add to ours
    error: str  # why there is no solution; empty if there is one

    def __init__(
        self,
        problem: LeastSquares,
        residuals: Tensor,
        floor: float,
        past: tuple[Tensor, Tensor] | None = None,
        in_parameter_space: bool = False,
    ) -> None:
        self.problem = problem
        self.past = past
        self._residuals = residuals
        in_parameter_space = in_parameter_space or problem.shards.group is not None  # where matrices can be summed
        self.in_residual_space = len(residuals) < problem.num_parameters and not in_parameter_space
        squares = problem.shards.run(self._add_chunks, residuals)
        if not self.in_residual_space:
            for part in (self.matrix, self.gradient):
                problem.shards.sum(part)
            if past is not None:
                self.matrix += past[0]
                self.gradient += past[1]
            squares = self.matrix.diagonal()
        # parameters without any effect get the bound, and are not moved
        self.scaling = squares.clamp(min=max(floor * squares.max().item(), 1e-300))
        if self.in_residual_space and self.jacobian is not None:
            self.matrix = _gram((self.jacobian / self.scaling.sqrt()).T)
        elif self.in_residual_space:
            self.matrix = self._gram_by_chunks(len(residuals))
        self._factored: tuple[float, Tensor | None] = (math.nan, None)
        finite = self.matrix.isfinite().all() and self.gradient.isfinite().all()
        self.error = "" if finite else "the Jacobian has NaN or infinite entries. The parameters are unchanged."
        if not self.gradient.any():
            self.error = "the gradient is zero: no parameter has an effect on the residuals."

    def _add_chunks(self, residuals: Tensor) -> Tensor:
        """Sums J^T r, and J^T J in the space of parameters, over our rows; returns the diagonal of J^T J otherwise."""
        problem = self.problem
        size = len(residuals) if self.in_residual_space else problem.num_parameters
        needed = 2 * size**2 * 8
        if needed > problem.memory:
            raise ValueError(
                f"{problem.num_parameters} trainable parameters and {len(residuals)} residuals make a linear system "
                f"of {size} unknowns, for which {needed / 2**20:.0f} MiB are needed, but `memory` is "
                f"{problem.memory / 2**20:.0f} MiB. Give more, train fewer parameters (an adapter), or use fewer rows."
            )
        self.gradient = torch.zeros_like(problem.start)
        squares = torch.zeros_like(problem.start)
        self.jacobian = None
        if len(residuals) * problem.num_parameters * 8 <= problem.memory // 2:
            self.jacobian = residuals.new_empty(len(residuals), problem.num_parameters)
        elif not self.in_residual_space:
            self.matrix = residuals.new_zeros(size, size)
        first = 0
        for chunk in problem.chunks():
            part = problem.jacobian(*chunk, out=None if self.jacobian is None else self.jacobian[first:])
            self.gradient.addmv_(part.T, residuals[first : first + len(part)])
            if self.jacobian is None and self.in_residual_space:
                squares += part.square().sum(0)
            elif self.jacobian is None:
                self.matrix += _gram(part)
            first += len(part)
        if self.jacobian is not None and not self.in_residual_space:
            self.matrix = _gram(self.jacobian)
        elif self.jacobian is not None:
            squares = self.jacobian.square().sum(0)
        return squares

    def _gram_by_chunks(self, size: int) -> Tensor:
        """J S^-1 J^T if J does not fit: parts of J are computed again for each other part."""
        matrix = self.scaling.new_empty(size, size)
        row = 0
        for number, chunk in enumerate(self.problem.chunks()):
            part = self.problem.jacobian(*chunk) / self.scaling
            column = 0
            for other_chunk in islice(self.problem.chunks(), number + 1):
                other = self.problem.jacobian(*other_chunk)
                block = part @ other.T
                matrix[row : row + len(part), column : column + len(other)] = block
                matrix[column : column + len(other), row : row + len(part)] = block.T
                column += len(other)
            row += len(part)
        return matrix

    def _factor(self, damping: float) -> Tensor | None:
        """The Cholesky factor of the damped matrix, kept for the next call; None if it is singular to rounding."""
        if self._factored[0] != damping:
            diagonal = self.matrix.diagonal()
            undamped = diagonal.clone()
            diagonal += damping if self.in_residual_space else damping * self.scaling
            triangle, failed = torch.linalg.cholesky_ex(self.matrix)
            diagonal.copy_(undamped)
            self._factored = (damping, None if failed else triangle)
        return self._factored[1]

    def solve(self, damping: float, residuals: Tensor) -> Tensor | None:
        """-(J^T J + damping S)^-1 J^T residuals, (P,); None if the matrix is singular to rounding."""
        triangle = self._factor(damping)
        if self.in_residual_space:
            if triangle is None:
                return None
            step = -self._transposed(_solve(triangle, residuals)) / self.scaling
        else:
            ours = residuals is self._residuals  # those of former steps are in the gradient, and linear
            gradient = self.gradient if ours else self._transposed(residuals)
            step = torch.full_like(gradient, math.nan) if triangle is None else -_solve(triangle, gradient)
            step = self.problem.shards.of_first(step)
        return step if step.isfinite().all() else None

    def inverse(self, damping: float, columns: Tensor) -> Tensor | None:
        """(J^T J + damping S)^-1 columns, (P, n), in the space of parameters; None if the matrix is singular."""
        triangle = self._factor(damping)
        return None if triangle is None else torch.cholesky_solve(columns, triangle)

    def _transposed(self, vector: Tensor) -> Tensor:
        """J^T vector."""
        problem = self.problem
        if self.jacobian is not None:
            return problem.shards.sum(self.jacobian.T @ vector)
        return problem.shards.sum(problem.shards.run(problem.pull_back, vector))

    def predicted_decrease(self, damping: float, step: Tensor) -> float:
        """The decrease of the sum of squares in the linear model, for the step of this damping."""
        return (damping * self.scaling * step.square() - self.gradient * step).sum().item()

    def rise_of_past(self, step: Tensor) -> float:
        """What the step adds to the squares of the former residuals."""
        if self.past is None:
            return 0.0
        matrix, gradient = self.past
        return (step @ (matrix @ step) + 2 * (gradient @ step)).item()

    def after(self, step: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """J^T J and J^T r of all residuals after a step, ours with these values, the former ones by their linear
        model. This instance is not used afterwards."""
        gradient = self._transposed(residuals)
        if self.past is not None:
            gradient += self.past[1] + self.past[0] @ step
        return self.matrix, gradient

    def norm(self, step: Tensor) -> float:
        """The length of a step in the metric S."""
        return (self.scaling * step.square()).sum().sqrt().item()

    def second_derivative(self, step: Tensor) -> Tensor:
        """The second derivative of the residuals along a step, (M,), by differences over a tenth of the step."""
        share = 0.1
        problem = self.problem
        ahead = problem.shards.run(problem.residuals, problem.start + share * step)
        if self.jacobian is not None:
            return 2 * ((ahead - self._residuals) / share - self.jacobian @ step) / share  # no second evaluation
        behind = problem.shards.run(problem.residuals, problem.start - share * step)
        return (ahead - 2 * self._residuals + behind) / share**2


def _solve(triangle: Tensor, vector: Tensor) -> Tensor:
    """(L L^T)^-1 vector; unlike `torch.cholesky_solve`, without a copy of L."""
    half = torch.linalg.solve_triangular(triangle, vector.unsqueeze(1), upper=False)
    return torch.linalg.solve_triangular(triangle.mT, half, upper=True).squeeze(1)


def _gram(matrix: Tensor) -> Tensor:
    """matrix^T matrix, (n, p) to (p, p), in six strips, which leave out most of what the symmetry repeats."""
    size = matrix.shape[1]
    gram = matrix.new_empty(size, size)
    width = -(-size // 6)
    for first in range(0, size, width):
        strip = matrix[:, first : first + width].T @ matrix[:, first:]
        gram[first : first + width, first:] = strip
        gram[first:, first : first + width] = strip.T
    return gram
