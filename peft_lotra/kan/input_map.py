# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers without trained parameters, whose derivatives are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .basis import check_input, logistic_derivatives


class FirstMap(nn.Module):
    """The first layer of a chain of KAN layers, whose outputs are functions of all inputs.

    A subclass defines `jet`, which `forward` calls, and sets `in_features`.
    """

    in_features: int

    def jet(
        self,
        x: Tensor,
        directions: Tensor | None,
        order: int,
        weights: Tensor | None,
    ) -> list[Tensor]:
        """Return the outputs (N, J) and their derivatives along straight lines up to an order, each (D, N, J).

        With weights (D,), the derivative of the highest order is the weighted sum over the directions, (1, N, J).

        Args:
            x: Points (N, I).
            directions: (D, I). None for order 0.
            order, weights: See above.
        """
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Look at the inputs of `forward`: a subclass may warn of some."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs (..., J) for inputs (..., I)."""
        check_input(x, self.in_features, self)
        self.check(x)
        *batch, width = x.shape
        outputs = self.jet(x.reshape(-1, width), None, 0, None)[0]
        return outputs.view(*batch, -1)


class InputMap(nn.Module):
    """A layer in a chain of KAN layers whose output j is a function of the input `sources[j]` only.

    A subclass defines `evaluate`, which `forward` and jets call.

    Args:
        in_features: Number I of inputs.
        sources: The index of the input of each of the J outputs.
    """

    sources: Tensor

    def __init__(self, in_features: int, sources: Sequence[int]) -> None:
        super().__init__()
        self.in_features = in_features
        indices = torch.as_tensor(sources, dtype=torch.long)
        self.register_buffer("sources", indices, persistent=False)

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """Return the outputs (..., J) and their derivatives up to an order with respect to their inputs z (..., J)."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Look at the inputs of `forward`: a subclass may warn of some."""

    def select(self, x: Tensor) -> Tensor:
        """Return the input (..., J) of each output for x (..., I). Raise as `KANLinear.forward`."""
        check_input(x, self.in_features, self)
        return x[..., self.sources]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs (..., J) for inputs (..., I)."""
        z = self.select(x)
        self.check(x)
        outputs, *_ = self.evaluate(z, 0)
        return outputs


class TanhBound(InputMap):
    r"""Keep activations inside the next layer's grid:

        y = middle + half tanh((z - middle) / half),   middle and half width of (low, high).

    Without it, splines fade out within `spline_order` intervals of the ends of their grids, and an activation that
    leaves a grid meets kinks and, farther out, only silu. `KAN(norm="tanh")` puts it between all layers. `jet` and
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

    def __init__(
        self,
        in_features: int,
        low: float = -1.0,
        high: float = 1.0,
    ) -> None:
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"`low` is {low} and `high` {high}, but they must be finite, and `low` below `high`.")
        super().__init__(in_features, range(in_features))
        self.low = float(low)
        self.high = float(high)

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """See `InputMap`."""
        middle = (self.low + self.high) / 2
        half = (self.high - self.low) / 2
        derivatives = logistic_derivatives(torch.tanh, (z - middle) / half, highest)
        value, *slopes = [derivative * half ** (1 - d) for d, derivative in enumerate(derivatives)]
        return [middle + value, *slopes]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, low={self.low:g}, high={self.high:g}"
