# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Weights of residuals, small where the solution is steep, and the sizes of residuals.

A weight multiplies a residual. Evaluate it every few steps and pass it as one more tensor of rows: it is then constant
in a step of `LevenbergMarquardt` or of Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..modules.checks import check_number


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
    slopes = jet(model, x, directions)[1].unsqueeze(-1).flatten(2)  # of a model that returns (n,), too
    return 1 / (1 + scale * slopes.square().sum((0, 2)).sqrt().unsqueeze(1))


def residual_norms(values: Any, points: Tensor) -> Tensor:
    """|r| of the residuals, (n,) or (n, m) to (n,), at points (n, I), in float32 at least.

    Raises:
        ValueError: The values are no tensor or not finite, or their rows are not as many as the points.
    """
    if not isinstance(values, Tensor) or values.shape[:1] != points.shape[:1]:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"`residual` is {given}, but must be a tensor (n,) or (n, m), a row for each point.")
    dtype = torch.promote_types(values.dtype, torch.float32)
    norms = values.detach().reshape(len(points), -1).norm(dim=1, dtype=dtype)
    if not norms.isfinite().all():
        raise ValueError(f"`residual` is not finite at {points[~norms.isfinite()][0].tolist()}.")
    return norms
