# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The linear model of a least-squares problem, and its damped steps by the normal equations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .problem import LeastSquares


class LinearModel:
    """The linear model r + J step around the parameters of a problem.

    Its matrix is J^T J (P, P) of the P parameters. If there are fewer residuals, and J fits into the memory, it is
    J S^-1 J^T (M, M) of the M residuals.

    Args:
        problem: The problem.
        residuals: Its residuals r at the parameters of the model, (M,).
        floor: The lower bound of S, as a share of its largest entry.
        past: J^T J and J^T r of former residuals, which are added. It needs `in_parameter_space`.
        in_parameter_space: Whether the matrix must be J^T J.

    Attributes:
        in_residual_space: Whether the matrix is J S^-1 J^T.
        jacobian: J, (M, P). None if it takes more than half of the memory.
        matrix: J^T J or J S^-1 J^T.
        scaling: S, (P,), the diagonal of J^T J, bounded from below.
        gradient: J^T r, (P,).
        error: Why there is no step. Empty if there is one.

    Raises:
        ValueError: The matrix does not fit into the memory of the problem.
    """

    def __init__(
        self,
        problem: LeastSquares,
        residuals: Tensor,
        floor: float,
        past: tuple[Tensor, Tensor] | None = None,
        in_parameter_space: bool = False,
    ) -> None:
        self.problem = problem
        self.residuals = residuals
        self.past = past
        size = self._choose_space(in_parameter_space)
        self.matrix = residuals.new_zeros(size, size)
        self.gradient = torch.zeros_like(problem.start)
        self._accumulate()

        # S is the diagonal of J^T J
        if self.in_residual_space:
            squares = self.jacobian.norm(dim=0).square()
        else:
            problem.shards.sum(self.matrix)
            problem.shards.sum(self.gradient)
            if past is not None:
                self.matrix += past[0]
                self.gradient += past[1]
            squares = self.matrix.diagonal()
        # parameters without any effect get the bound; their gradient is zero, so that they do not move
        lowest = floor * squares.max().item()
        self.scaling = squares.clamp(min=max(lowest, 1e-300))
        if self.in_residual_space:
            scaled = self.jacobian / self.scaling.sqrt()
            _add_gram(self.matrix, scaled.T)

        self.error = ""
        is_finite = self.matrix.isfinite().all() and self.gradient.isfinite().all()
        if not is_finite:
            self.error = "the Jacobian has NaN or infinite entries. The parameters are unchanged."
        elif not self.gradient.any():
            self.error = "the gradient is zero: the loss is at a minimum, or no parameter changes it."

    def _choose_space(self, in_parameter_space: bool) -> int:
        """Choose the space of the matrix, and whether J is kept; return the size of the matrix."""
        problem = self.problem
        rows = len(self.residuals)
        count = problem.num_parameters
        bytes_of_jacobian = 2 * 8 * rows * count  # J, and its scaled copy in the space of residuals
        self.jacobian: Any = None
        if bytes_of_jacobian <= problem.memory:
            self.jacobian = self.residuals.new_empty(rows, count)

        needed = bytes_of_matrices(count)
        self.in_residual_space = False
        # processes can only sum matrices of the parameters
        if rows < count and not in_parameter_space and problem.shards.group is None:
            needed_by_residuals = bytes_of_matrices(rows) + bytes_of_jacobian
            self.in_residual_space = needed_by_residuals <= problem.memory
            needed = min(needed, needed_by_residuals)
        if needed > problem.memory:
            raise ValueError(
                f"{count} trainable parameters and {rows} residuals need {needed / 2**20:.0f} MiB, but `memory` is "
                f"{problem.memory / 2**20:.0f} MiB. Give more, train fewer parameters (an adapter), or use fewer rows."
            )
        return rows if self.in_residual_space else count

    def _accumulate(self) -> None:
        """Add J^T r, and in the space of parameters J^T J, chunk by chunk."""
        first = 0
        for term, rows in self.problem.chunks():
            out = None if self.jacobian is None else self.jacobian[first:]
            jacobian = self.problem.jacobian(term, rows, out)
            last = first + len(jacobian)
            self.gradient.addmv_(jacobian.T, self.residuals[first:last])
            if not self.in_residual_space:
                _add_gram(self.matrix, jacobian)
            first = last

    def inverse(self, damping: float, columns: Tensor) -> Tensor | None:
        """Compute (J^T J + damping S)^-1 columns, (P, n), or in the space of residuals (J S^-1 J^T + damping)^-1
        columns, (M, n).

        Returns:
            None if the matrix is singular to rounding.
        """
        diagonal = self.matrix.diagonal()  # damped in place and restored, which saves a copy of the matrix
        undamped = diagonal.clone()
        diagonal += damping if self.in_residual_space else damping * self.scaling
        triangle, info = torch.linalg.cholesky_ex(self.matrix)
        diagonal.copy_(undamped)
        if info:
            return None
        # `cholesky_solve` would copy the triangle
        half = torch.linalg.solve_triangular(triangle, columns, upper=False)
        return torch.linalg.solve_triangular(triangle.mT, half, upper=True)

    def solve(self, damping: float) -> Tensor | None:
        """Return the step -(J^T J + damping S)^-1 J^T r, (P,). None if the matrix is singular to rounding."""
        right = self.residuals if self.in_residual_space else self.gradient
        solution = self.inverse(damping, right.unsqueeze(1))
        if solution is None:
            step = torch.full_like(self.gradient, math.nan)  # since all processes must take part in the broadcast
        elif self.in_residual_space:
            # S^-1 J^T (J S^-1 J^T + damping)^-1 r is the same step
            step = -(self.jacobian.T @ solution.squeeze(1)) / self.scaling
        else:
            step = -solution.squeeze(1)
        # all processes take the step of the first: the last digits depend on the machine
        step = self.problem.shards.broadcast(step)
        return step if step.isfinite().all() else None

    def predicted_decrease(self, damping: float, step: Tensor) -> float:
        """Return |r|^2 - |r + J step|^2, the decrease by the linear model.

        J^T J is not needed, since (J^T J + damping S) step = -J^T r.
        """
        decreases = damping * self.scaling * step.square() - self.gradient * step
        return decreases.sum().item()

    def rise_of_past(self, step: Tensor) -> float:
        """Return by how much a step increases the sum of squares of the former residuals."""
        if self.past is None:
            return 0.0
        matrix, gradient = self.past
        rise = step @ (matrix @ step) + 2 * (gradient @ step)
        return rise.item()

    def after(self, step: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Return J^T J and J^T r after a step to these residuals, former residuals included.

        J stays that of the parameters before the step. The former residuals change as their linear model predicts.
        """
        if self.jacobian is None:
            gradient = self.problem.pull_back(residuals)
        else:
            gradient = self.jacobian.T @ residuals
        self.problem.shards.sum(gradient)
        if self.past is not None:  # the matrix contains the former residuals already
            matrix, past_gradient = self.past
            gradient += past_gradient + matrix @ step
        return self.matrix, gradient


def bytes_of_matrices(size: int) -> int:
    """Return the memory of the matrix and its Cholesky factor, in float64."""
    return 2 * 8 * size**2


def _add_gram(gram: Tensor, matrix: Tensor) -> None:
    """Add matrix^T matrix, of (n, p), to (p, p).

    The result is symmetric. It is computed in six strips of rows, each only from the diagonal to the right. What is
    right of the diagonal block is also added, transposed, below it. This leaves out almost half of the products.
    """
    size = matrix.shape[1]
    width = max(1, math.ceil(size / 6))
    for first in range(0, size, width):
        last = first + width
        strip = matrix[:, first:last].T @ matrix[:, first:]
        gram[first:last, first:] += strip
        gram[last:, first:last] += strip[:, width:].T
