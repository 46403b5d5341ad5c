# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Weights of residuals: small where the solution is steep, later in time, or large where a residual stays large.

A weight multiplies a residual. Evaluate it now and then and give it as one more tensor of rows: then it is constant in
a step of `LevenbergMarquardt` or of Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..modules.checks import as_number, check_count


@torch.inference_mode(False)
@torch.no_grad()
def gradient_weights(model: nn.Module, x: Tensor, scale: float = 0.1, directions: Tensor | None = None) -> Tensor:
    """w = 1 / (1 + scale |grad u|), (n, 1): a shock, with a residual as large as it is steep, owns the loss no longer.

    Args:
        model: A network, as for `jet`; of several outputs all derivatives count.
        x: Points (n, I).
        scale: The inverse of the slope that gives half of the weight.
        directions: The derivatives that count, (D, I); all coordinates by default.

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
    if not as_number(scale) >= 0:
        raise ValueError(f"`scale` is {scale!r:.100}, but must be finite and at least 0.")
    if isinstance(x, Tensor) and x.dim() != 2:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but must be (n, I).")
    slopes = jet(model, x, directions)[1].unsqueeze(-1).flatten(2)  # of a model that returns (n,), too
    return 1 / (1 + scale * slopes.square().sum((0, 2)).sqrt().unsqueeze(1))


def _real(values: Any, argument: str) -> Tensor:
    """A tensor of real numbers, one or more for each row, in float32 at least."""
    if not isinstance(values, Tensor) or values.is_complex():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"`{argument}` is {given}, but must be a tensor of real numbers.")
    if not values.dim() or not values.numel():
        raise ValueError(f"`{argument}` has shape {tuple(values.shape)}, but must have one or more rows.")
    return values.to(torch.promote_types(values.dtype, torch.float32))


@torch.inference_mode(False)
@torch.no_grad()
def causal_weights(residuals: Tensor, times: Tensor, strictness: float = 1.0, slices: int = 20) -> Tensor:
    r"""w_i = exp(-strictness / 2 sum of the mean squared residuals of all earlier slices of time), (n, 1).

    A time is trained when all earlier ones are solved. With the square root of the published weight, the weight of a
    squared residual is the published one.

    Args:
        residuals: (n,) or (n, m).
        times: The time of each, (n,) or (n, 1).
        strictness: How small the residuals must get before later times count.
        slices: The number of equal slices of the range of times.

    Raises:
        ValueError: Shapes do not fit, values are not finite, or an argument is out of range.

    Source: S. Wang, S. Sankaran and P. Perdikaris, "Respecting causality is all you need for training physics-informed
    neural networks", arXiv 2203.07404.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import causal_weights
        >>> causal_weights(torch.ones(4), torch.tensor([0.0, 0.3, 0.6, 1.0]), slices=2).flatten()
        tensor([1.0000, 1.0000, 0.6065, 0.6065])
    """
    residuals, times = _real(residuals, "residuals"), _real(times, "times").flatten()
    n, slices = len(residuals), check_count(slices, "slices")
    if times.shape != (n,):
        raise ValueError(f"`times` has {len(times)} entries for {n} residuals, but must have one for each.")
    if not as_number(strictness) >= 0:
        raise ValueError(f"`strictness` is {strictness!r:.100}, but must be finite and at least 0.")
    squares = residuals.reshape(n, -1).square().sum(1)
    if not (squares.isfinite().all() and times.isfinite().all()):
        raise ValueError("`residuals` and `times` must be finite.")
    first, last = times.aminmax()
    index = (
        ((times - first) / (last - first).clamp(min=torch.finfo(times.dtype).tiny) * slices)
        .long()
        .clamp(max=slices - 1)
    )
    count = torch.bincount(index, minlength=slices).clamp(min=1)
    means = torch.zeros(slices, dtype=squares.dtype, device=squares.device).index_add(0, index, squares) / count
    before = means.cumsum(0) - means
    return torch.exp(-strictness / 2 * before)[index].unsqueeze(1)


class ResidualAttention:
    r"""Self-adaptive weights of fixed points: w <- decay w + rate |r| / max |r|, that grow where residuals stay large.

    Args:
        decay: Below 1, so that weights stay below rate / (1 - decay).
        rate: How fast they follow.

    Attributes:
        weights: (n, 1) after the first update.

    Raises:
        ValueError: An argument is out of range, or the number of residuals changed.

    Source: S. J. Anagnostopoulos et al., "Residual-based attention in physics-informed neural networks", arXiv
    2307.00379.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import ResidualAttention
        >>> attention = ResidualAttention(decay=0.5, rate=0.5)
        >>> attention.update(torch.tensor([1.0, 2.0])).flatten()
        tensor([0.7500, 1.0000])
    """

    def __init__(self, decay: float = 0.9, rate: float = 0.1) -> None:
        if not (0 <= as_number(decay) < 1 and as_number(rate) > 0):
            raise ValueError(
                f"`decay` is {decay!r:.100} and `rate` {rate!r:.100}, but must be in [0, 1), and finite and above 0."
            )
        self.decay, self.rate = float(decay), float(rate)
        self.weights: Tensor | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, residuals: Tensor) -> Tensor:
        """Takes residuals (n,) or (n, m) of the points and returns the new weights (n, 1), which start at 1."""
        residuals = _real(residuals, "residuals")
        size = residuals.reshape(len(residuals), -1).norm(dim=1, keepdim=True)
        if not size.isfinite().all():
            raise ValueError(f"`residuals` {int((~size.isfinite()).nonzero()[0, 0])} is not finite.")
        before = torch.ones_like(size) if self.weights is None else self.weights
        if before.shape != size.shape:
            raise ValueError(
                f"There are {len(size)} residuals, but weights of {len(before)} points: make new weights for "
                "new points."
            )
        self.weights = self.decay * before + self.rate * size / size.max().clamp(min=torch.finfo(size.dtype).tiny)
        return self.weights.clone()  # which may be written into
