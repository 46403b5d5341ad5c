# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The linear model of a least-squares problem, and its damped solutions by the normal equations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .problem import LeastSquares


class LinearModel:
    """The linear model r + J step around the parameters, in the smaller space of P parameters or M residuals.

    Attributes:
        jacobian: J, (M, P); None in the space of parameters if it takes more than half of the memory.
        matrix: J^T J, (P, P), or J S^-1 J^T, (M, M).
        scaling: S, (P,), the diagonal of J^T J, at least `floor` times its largest entry.
        gradient: J^T r, (P,).
        past: J^T J and J^T r of former residuals, at the parameters; `matrix` and `gradient` include them.
        error: Why there is no solution; empty if there is one.

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
        self.past = past
        self.residuals = residuals
        in_parameter_space = in_parameter_space or problem.shards.group is not None  # where matrices can be summed
        rows, count = len(residuals), problem.num_parameters
        bytes_of_jacobian = 2 * 8 * rows * count  # and of a scaled copy
        needed = math.inf
        if rows < count and not in_parameter_space:
            needed = bytes_of_matrices(rows) + bytes_of_jacobian
        self.in_residual_space = needed <= problem.memory
        self.jacobian: Any = None
        if bytes_of_jacobian <= problem.memory:
            self.jacobian = residuals.new_empty(rows, count)
        problem.shards.run(self._accumulate, rows if self.in_residual_space else count, needed)
        if self.in_residual_space:
            squares = self.jacobian.norm(dim=0).square()
        else:
            for total, before in zip((self.matrix, self.gradient), past or (0.0, 0.0), strict=True):
                problem.shards.sum(total)
                total += before
            squares = self.matrix.diagonal()
        # parameters without any effect get the bound, and are not moved
        self.scaling = squares.clamp(min=max(floor * squares.max().item(), 1e-300))
        if self.in_residual_space:
            _add_gram(self.matrix, (self.jacobian / self.scaling.sqrt()).T)
        finite = self.matrix.isfinite().all() and self.gradient.isfinite().all()
        self.error = "" if finite else "the Jacobian has NaN or infinite entries. The parameters are unchanged."
        if not self.gradient.any():
            self.error = "the gradient is zero: no parameter has an effect on the residuals."

    def _accumulate(self, size: int, in_residuals: float) -> None:
        """Compute J where it is kept, J^T r, and in the space of parameters J^T J.

        The space of residuals takes `in_residuals` bytes.
        """
        problem, residuals = self.problem, self.residuals
        needed = min(bytes_of_matrices(size), in_residuals)
        if needed > problem.memory:
            raise ValueError(
                f"{problem.num_parameters} trainable parameters and {len(residuals)} residuals need "
                f"{needed / 2**20:.0f} MiB, but `memory` is {problem.memory / 2**20:.0f} MiB. Give more, train fewer "
                "parameters (an adapter), or use fewer rows."
            )
        self.gradient = torch.zeros_like(problem.start)
        self.matrix = residuals.new_zeros(size, size)
        first = 0
        for chunk in problem.chunks():
            part = problem.jacobian(*chunk, out=None if self.jacobian is None else self.jacobian[first:])
            self.gradient.addmv_(part.T, residuals[first : first + len(part)])
            if not self.in_residual_space:
                _add_gram(self.matrix, part)
            first += len(part)

    def inverse(self, damping: float, columns: Tensor) -> Tensor | None:
        """Solve the damped system for columns; return None if the matrix is singular to rounding.

        It is (J^T J + damping S)^-1 columns, (P, n), or in the space of residuals (J S^-1 J^T + damping)^-1 columns,
        (M, n).
        """
        diagonal = self.matrix.diagonal()  # damped in place, and restored: a copy of the matrix would cost as much
        undamped = diagonal.clone()
        diagonal += damping if self.in_residual_space else damping * self.scaling
        triangle, failed = torch.linalg.cholesky_ex(self.matrix)
        diagonal.copy_(undamped)
        if failed:
            return None
        half = torch.linalg.solve_triangular(triangle, columns, upper=False)  # `cholesky_solve` would copy L
        return torch.linalg.solve_triangular(triangle.mT, half, upper=True)

    def solve(self, damping: float) -> Tensor | None:
        """Return the step -(J^T J + damping S)^-1 J^T r, (P,); None if the matrix is singular to rounding."""
        right = self.residuals if self.in_residual_space else self.gradient
        solution = self.inverse(damping, right.unsqueeze(1))
        # NaN, and no early return: all processes take part in the sums and the broadcast
        step = torch.full_like(right, math.nan) if solution is None else -solution.squeeze(1)
        if self.in_residual_space:
            step = self._transposed(step) / self.scaling
        else:
            step = self.problem.shards.of_first(step)
        return step if step.isfinite().all() else None

    def _transposed(self, vector: Tensor) -> Tensor:
        """Return J^T vector."""
        shards = self.problem.shards
        if self.jacobian is not None:
            return shards.sum(self.jacobian.T @ vector)
        return shards.sum(shards.run(self.problem.pull_back, vector))

    def predicted_decrease(self, damping: float, step: Tensor) -> float:
        """Return |r|^2 - |r + J step|^2 for the step of this damping, where (J^T J + damping S) step = -J^T r."""
        return (damping * self.scaling * step.square() - self.gradient * step).sum().item()

    def rise_of_past(self, step: Tensor) -> float:
        """Return by how much a step increases the sum of squares of the former residuals."""
        if self.past is None:
            return 0.0
        matrix, gradient = self.past
        return (step @ (matrix @ step) + 2 * (gradient @ step)).item()

    def after(self, step: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Return J^T J and J^T r of all residuals after a step: these ones, and the former ones by their linear model.

        This instance is not used afterwards.
        """
        gradient = self._transposed(residuals)
        if self.past is not None:
            gradient += self.past[1] + self.past[0] @ step
        return self.matrix, gradient


def bytes_of_matrices(size: int) -> int:
    """Return the memory of the matrix and its Cholesky factor, in float64."""
    return 2 * 8 * size**2


def _add_gram(gram: Tensor, matrix: Tensor) -> None:
    """Add matrix^T matrix, of (n, p), to (p, p), in six strips, which leave out most of what the symmetry repeats."""
    size = matrix.shape[1]
    width = max(1, -(-size // 6))
    for first in range(0, size, width):
        strip = matrix[:, first : first + width].T @ matrix[:, first:]
        gram[first : first + width, first:] += strip
        gram[first + width :, first : first + width] += strip[:, width:].T
