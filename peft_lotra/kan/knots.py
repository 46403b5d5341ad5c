# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Knots that are dense where a function is steep: a monotone map of each input in front of uniform grids."""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import spline_pieces
from .input_map import InputMap


_DEGREE = 4  # of the map: its derivatives up to the third are continuous


class KnotMap(InputMap):
    r"""
    A layer before a KAN layer that maps each interval [low, high] to itself, so that the uniform grid of the KAN layer
    has knots where the layer's inputs need them:

        phi(x) = sum_k c_k B_k(x),   c increasing,

    a spline of degree 4, whose slope follows the density: twice the density means half the distance of knots. Outside
    of the interval the map goes on along its tangent. Everything that is fast on uniform grids (values, jets,
    Jacobians by layers) stays so, which it would not on a basis of any knots.

    `refine_grid` puts maps in front of layers and keeps the function. A state dict holds the map's pieces, but the
    network that loads it must have the map: save the whole module (`torch.save`), or call `refine_grid` with a density
    of the same number of cells before loading.

    Args:
        low, high: The ends of the intervals, (I,).
        density: Positive numbers (I, C): the relative number of knots wanted in C equal cells of each interval.

    Raises:
        ValueError: The shapes do not fit, an interval is empty, or a density is not positive and finite.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KnotMap
        >>> # most knots in the middle third of [-1, 1]
        >>> steep = torch.tensor([[1.0, 1.0, 8.0, 8.0, 1.0, 1.0]])
        >>> knots = KnotMap(torch.tensor([-1.0]), torch.tensor([1.0]), steep)
        >>> knots(torch.tensor([[-1.0], [-0.3], [1.0]]))
        tensor([[-1.0000],
                [-0.6...],
                [ 1.0000]])
    """

    low: Tensor
    high: Tensor
    pieces: Tensor  # (I, cells, 5): the polynomials in the share of the cell, powers ascending

    def __init__(self, low: Tensor, high: Tensor, density: Tensor) -> None:
        is_shaped = density.dim() == 2 and low.shape == high.shape == density.shape[:1] and density.numel()
        if not (is_shaped and (low < high).all() and density.isfinite().all() and (density > 0).all()):
            raise ValueError(
                f"`low` {tuple(low.shape)}, `high` {tuple(high.shape)} and `density` {tuple(density.shape)} must be "
                "(I,), (I,) and (I, C), each `low` below its `high`, and `density` finite and above zero."
            )
        super().__init__(len(low), range(len(low)))
        self.register_buffer("low", low.detach().clone())
        self.register_buffer("high", high.detach().clone())
        # Four cells for each of the density, so that the mean over four that follows is local.
        steps = density.double().repeat_interleave(_DEGREE, 1).unfold(1, _DEGREE, 1).mean(-1)
        # The slope is a spline of degree 3, constant at the ends, where the tangent goes on.
        first, last = (steps[:, end, None].expand(-1, _DEGREE - 1) for end in (0, -1))
        steps = torch.cat([torch.zeros_like(first[:, :1]), first, steps, last], 1)
        pieces = steps.cumsum(1).unfold(1, _DEGREE + 1, 1) @ spline_pieces(_DEGREE, steps.dtype, steps.device)[0]
        start, end = pieces[:, 0, 0], pieces[:, -1].sum(-1)
        pieces *= ((high - low).double() / (end - start))[:, None, None]
        pieces[..., 0] += low.double()[:, None] - pieces[:, :1, 0]
        self.register_buffer("pieces", pieces.to(low))

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """See `InputMap`."""
        cells = self.pieces.shape[1]
        low, high = self.low.to(z), self.high.to(z)
        inside = torch.clamp(z, low, high)
        per_unit = cells / (high - low)
        position = (inside - low) * per_unit
        cell = position.detach().nan_to_num().long().clamp(0, cells - 1)
        t = position - cell
        columns = torch.arange(len(low), device=z.device).expand_as(cell)
        derivatives = [torch.zeros_like(z)] * (max(highest, 1) + 1)
        for coefficient in self.pieces.to(z)[columns, cell].flip(-1).unbind(-1):  # Horner
            lower = [coefficient, *(d * derivative for d, derivative in enumerate(derivatives, 1))]
            derivatives = [derivative * t + addend for derivative, addend in zip(derivatives, lower, strict=False)]
        value, slope, *higher = [derivative * per_unit**d for d, derivative in enumerate(derivatives)]
        tangent = value + slope * (z - inside)
        return [tangent, slope, *(derivative * (inside == z) for derivative in higher)][: highest + 1]

    @torch.no_grad()
    def inverse(self, s: Tensor) -> Tensor:
        """The points that the map takes to s (..., I), by bisection; s must lie in the intervals."""
        below, above = (end.to(s).expand_as(s) for end in (self.low, self.high))
        for _ in range(60):
            middle = (below + above) / 2
            high = self(middle) > s
            below, above = torch.where(high, below, middle), torch.where(high, middle, above)
        return (below + above) / 2

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, cells={self.pieces.shape[1] // _DEGREE}"
