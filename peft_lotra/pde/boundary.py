# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Conditions on normal derivatives, as terms of `solve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..modules.checks import check_number


Values = Callable[[Tensor], Tensor] | Tensor | float
Term = tuple[Callable[..., Tensor], tuple[Tensor, ...], float]


def robin(
    points: Tensor,
    normals: Tensor,
    a: Values,
    b: Values,
    values: Values = 0.0,
    *,
    weight: float = 100.0,
) -> Term:
    """Return the condition a u + b u_n = values as an entry of `terms`, u_n = sum_i n_i du / dx_i.

    `robin(points, normals, 0.0, 1.0, values)` is the Neumann condition u_n = values.

    Args:
        points: (n, I), for example from `Region.boundary` or `side_points`.
        normals: Unit vectors (n, I). For points (x, y, t), the last column is zero.
        a, b, values: A number, a tensor (n,) or (n, O), or a function of the points that returns such a tensor.
        weight: The weight of the term. Its value matters little: weights of 1 to 1000 give a Helmholtz problem errors
            of 4e-6 to 2e-5.

    Returns:
        (function, rows, weight), for `terms` of `solve` and `LevenbergMarquardt`.

    Raises:
        ValueError: `normals` are not unit vectors of the shape of `points`. `a`, `b` or `values` is not finite, or has
            another number of rows. `weight` is not above 0.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import jet
        >>> from peft_lotra.pde import robin, side_points, solve
        >>> def equation(model, x):  # u'' = 0, u(0) = 0, u + u' = 2 at x = 1
        ...     return jet(model, x)[2][0]
        >>> points, normals = side_points([0], [1], 1, sides=[(0, "high")])
        >>> term = robin(points, normals, 1.0, 1.0, 2.0)
        >>> result = solve(equation, [0], [1], distance=lambda x: x, terms=[term], steps=12, progress=False)
        >>> abs(result.model(points).item() - 1) < 0.01
        True
    """
    weight = check_number(weight, "weight", "(0, inf)")
    if points.dim() != 2 or normals.shape != points.shape:
        raise ValueError(
            f"`points` has shape {tuple(points.shape)} and `normals` {tuple(normals.shape)}, but both must be (n, I)."
        )
    lengths = normals.norm(dim=1)
    if not ((lengths - 1).abs() < 1e-3).all():
        raise ValueError(
            f"`normals` must have length 1, but they have lengths from {lengths.min():.4g} to {lengths.max():.4g}."
        )
    rows = [points, normals.to(points)]
    for name, argument in (("a", a), ("b", b), ("values", values)):
        rows.append(_column(name, argument, points))
    return _residual, tuple(rows), weight


def _residual(
    model: nn.Module,
    x: Tensor,
    normals: Tensor,
    a: Tensor,
    b: Tensor,
    values: Tensor,
) -> Tensor:
    """Evaluate a u + b u_n - values."""
    u, du = jet(model, x, order=1)
    slope = (normals.T.unsqueeze(-1) * du).sum(0)
    return a * u + b * slope - values


def _column(name: str, values: Any, points: Tensor) -> Tensor:
    """Return values at the points, (n, 1) or (n, O)."""
    if callable(values):
        values = values(points)
    column = torch.as_tensor(values, dtype=points.dtype, device=points.device).detach()
    count = len(points)
    if column.dim() < 2:
        column = column.expand(count).unsqueeze(1)
    if len(column) != count or not column.isfinite().all():
        raise ValueError(f"`{name}` has shape {tuple(column.shape)}, but must be finite, with {count} rows.")
    return column
