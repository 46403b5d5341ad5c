# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Activations that cannot leave the grids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules.checks import as_number
from .input_map import InputMap


class TanhBound(InputMap):
    r"""A layer between KAN layers that keeps activations inside of the next layer's grid:

        y = middle + half tanh((z - middle) / half),   middle and half width of (low, high).

    Without it, splines fade out within `spline_order` intervals of the ends of their grids, and an activation that
    leaves a grid meets kinks and, farther out, silu alone. `KAN(norm="tanh")` puts it between all layers. `jet` and
    `LevenbergMarquardt` know the layer in closed form.

    Args:
        in_features: The number of activations.
        low, high: The ends of the interval.

    Raises:
        ValueError: The interval is empty or not finite.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import TanhBound
        >>> TanhBound(3)(torch.tensor([-99.0, 0.0, 99.0])).tolist()
        [-1.0, 0.0, 1.0]
    """

    def __init__(self, in_features: int, low: float = -1.0, high: float = 1.0) -> None:
        if not isinstance(in_features, int) or in_features < 1:
            raise ValueError(f"`in_features` is {in_features!r}, but must be an integer of at least 1.")
        if not as_number(low) < as_number(high):
            raise ValueError(f"`low` is {low} and `high` {high}, but they must be finite, and `low` below `high`.")
        super().__init__(in_features, range(in_features))
        self.low, self.high = float(low), float(high)

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InputMap`."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        y = torch.tanh((z - middle) / half)
        slope = 1 - y.square()
        return middle + half * y, slope, -2 / half * y * slope

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, low={self.low:g}, high={self.high:g}"
