# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Weights of residuals: small where the solution is steep or late in time, large where a residual stays large.

A weight multiplies a residual. Evaluate it every few steps and pass it as one more tensor of rows: it is then constant
in a step of `LevenbergMarquardt` or of Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..modules.checks import check_count, check_number


@torch.inference_mode(False)
@torch.no_grad()
def gradient_weights(model: nn.Module, x: Tensor, scale: float = 0.1, directions: Tensor | None = None) -> Tensor:
    """w = 1 / (1 + scale |grad u|), (n, 1): a shock, whose residual is as large as it is steep, no longer dominates.

    Args:
        model: A network, as for `jet`; of several outputs all derivatives count.
        x: Points (n, I).
        scale: The inverse of the slope at which the weight is 1/2.
        directions: The directions of the derivatives, (D, I); all coordinates by default.

    Raises:
        ValueError: `scale` is negative.

    Source: L. Liu et al., "Discontinuity computing using physics-informed neural networks", arXiv 2206.03864.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.pde import gradient_weights
        >>> gradient_weights(KAN([2, 5, 1]), torch.rand(10, 2)).shape
        torch.Size([10, 1])
    """
    scale = check_number(scale, "scale", "[0, inf)")
    if isinstance(x, Tensor) and x.dim() != 2:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but must be (n, I).")
    slopes = jet(model, x, directions)[1].unsqueeze(-1).flatten(2)  # of a model that returns (n,), too
    return 1 / (1 + scale * slopes.square().sum((0, 2)).sqrt().unsqueeze(1))


def residual_norms(values: Any, argument: str, points: Tensor | None = None) -> Tensor:
    """|r| of each row of residuals, (n,) or (n, m) to (n,), in float32 at least.

    Raises:
        ValueError: The values are no tensor or not finite, or their rows are not as many as the points.
    """
    rows = getattr(values, "shape", ())[:1]
    if not isinstance(values, Tensor) or not rows or rows != (rows if points is None else points.shape[:1]):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"`{argument}` is {given}, but must be a tensor (n,) or (n, m), a row for each point.")
    norms = values.detach().reshape(*rows, -1).norm(dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
    if not norms.isfinite().all():
        row = int((~norms.isfinite()).nonzero()[0])
        raise ValueError(f"`{argument}` is not finite at {f'row {row}' if points is None else points[row].tolist()}.")
    return norms


@torch.inference_mode(False)
@torch.no_grad()
def causal_weights(residuals: Tensor, times: Tensor, strictness: float = 1.0, slices: int = 20) -> Tensor:
    r"""w_i = exp(-strictness / 2 sum of the mean squared residuals of all earlier slices of time), (n, 1).

    Late times count once earlier ones are solved. The published weight multiplies a squared residual; this one is its
    square root.

    Args:
        residuals: Residuals (n,) or (n, m) at n points.
        times: The time of each point, (n,) or (n, 1).
        strictness: How small the residuals must get before later times count.
        slices: The number of slices of equal length of the time interval.

    Raises:
        ValueError: Shapes do not fit, values are not finite, or an argument is out of range.

    Source: S. Wang, S. Sankaran and P. Perdikaris, "Respecting causality is all you need for training physics-informed
    neural networks", arXiv 2203.07404.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import causal_weights
        >>> times = torch.tensor([0.0, 0.3, 0.6, 1.0])
        >>> causal_weights(torch.ones(4), times, slices=2).flatten()
        tensor([1.0000, 1.0000, 0.6065, 0.6065])
    """
    squares, slices = residual_norms(residuals, "residuals").square(), check_count(slices, "slices")
    strictness, times = check_number(strictness, "strictness", "[0, inf)"), times.flatten()
    if times.shape != squares.shape:
        raise ValueError(f"`times` has {len(times)} entries for {len(squares)} residuals, but must have one for each.")
    if not times.isfinite().all():
        raise ValueError("`times` must be finite.")
    first, last = times.aminmax()
    share = (times - first) / (last - first) if first < last else torch.zeros_like(squares)
    index = (share * slices).long().clamp(max=slices - 1)
    means = torch.bincount(index, squares, slices) / torch.bincount(index, minlength=slices).clamp(min=1)
    before = means.cumsum(0) - means
    return torch.exp(-strictness / 2 * before)[index].unsqueeze(1)
