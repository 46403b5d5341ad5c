# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Knots that are dense where a function is steep: a monotone map of each input in front of uniform grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import spline_pieces
from .input_map import InputMap


_DEGREE = 4  # of the map: its derivatives up to the third are continuous


class KnotMap(InputMap):
    r"""Map each interval [low, high] to itself, so that the next layer's uniform grid has knots where it needs them:

        phi(x) = sum_k c_k B_k(x),   c increasing,

    a spline of degree 4, whose slope follows the density: twice the density means half the distance of knots. Outside
    of the interval the map goes on along its tangent. Values, jets and Jacobians stay as fast as on uniform grids.

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
        are_alike = low.shape == high.shape == density.shape[:-1]
        fits = are_alike and low.dim() == 1 and density.numel() > 0
        is_usable = (density > 0) & density.isfinite()
        if not (fits and is_usable.all() and (low < high).all()):
            raise ValueError(
                f"`low` {tuple(low.shape)}, `high` {tuple(high.shape)} and `density` {tuple(density.shape)} must be "
                "(I,), (I,) and (I, C), each `low` below its `high`, and `density` finite and above zero."
            )
        super().__init__(len(low), range(len(low)))
        self.register_buffer("low", low.detach().clone())
        self.register_buffer("high", high.detach().clone())

        # Four cells for each of the density, so that the mean over four that follows is local.
        cells = density.double().repeat_interleave(_DEGREE, 1)
        steps = cells.unfold(1, _DEGREE, 1).mean(-1)

        # The slope is a spline of degree 3, constant at the ends, where the tangent goes on.
        padded = F.pad(steps, (_DEGREE - 1, _DEGREE - 1), mode="replicate")
        coefficients = F.pad(padded, (1, 0)).cumsum(1)
        polynomials, *_ = spline_pieces(_DEGREE, steps.dtype, steps.device)
        pieces = coefficients.unfold(1, _DEGREE + 1, 1) @ polynomials

        # The map takes the ends of the intervals to themselves.
        start = pieces[:, 0, 0]
        end = pieces[:, -1].sum(-1)
        scale = (high - low).double() / (end - start)
        pieces *= scale[:, None, None]
        shift = low.double() - pieces[:, 0, 0]
        pieces[..., 0] += shift[:, None]
        self.register_buffer("pieces", pieces.to(low))

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """See `InputMap`."""
        num_cells = self.pieces.shape[1]
        low = self.low.to(z)
        high = self.high.to(z)
        per_unit = num_cells / (high - low)
        inside = torch.clamp(z, low, high)
        position = (inside - low) * per_unit
        cell = position.detach().nan_to_num().long()
        cell = cell.clamp(0, num_cells - 1)
        fraction = position - cell
        inputs = torch.arange(len(low), device=z.device)
        pieces = self.pieces.to(z)
        coefficients = pieces[inputs.expand_as(cell), cell]

        # the polynomial and its derivatives by Horner's rule, from the highest power on
        derivatives = [torch.zeros_like(z)] * (max(highest, 1) + 1)
        for coefficient in coefficients.flip(-1).unbind(-1):
            for d in range(len(derivatives) - 1, 0, -1):
                derivatives[d] = derivatives[d] * fraction + d * derivatives[d - 1]
            derivatives[0] = derivatives[0] * fraction + coefficient
        value, slope, *higher = [derivative * per_unit**d for d, derivative in enumerate(derivatives)]

        # outside of the interval, the tangent
        tangent = value + slope * (z - inside)
        is_inside = inside == z
        derivatives = [tangent, slope]
        for derivative in higher:
            derivatives.append(derivative * is_inside)
        return derivatives[: highest + 1]

    @torch.no_grad()
    def inverse(self, s: Tensor) -> Tensor:
        """Return the points that the map takes to s (..., I) in the intervals, by bisection."""
        low = self.low.to(s).expand_as(s)
        high = self.high.to(s).expand_as(s)
        for _ in range(60):
            middle = (low + high) / 2
            is_above = self(middle) > s
            low = torch.where(is_above, low, middle)
            high = torch.where(is_above, middle, high)
        return (low + high) / 2

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, cells={self.pieces.shape[1] // _DEGREE}"
