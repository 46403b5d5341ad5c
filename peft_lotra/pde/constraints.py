# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks whose boundary and initial values are exact for all parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.api import jet, jet_by_transforms
from ..derivatives.chain_rule import Jet, multiply, row_counts
from ..derivatives.stages import Entry, composed_jet, register, stages_of
from ..modules.calls import check_module
from ..modules.checks import as_number
from .boxes import Side, check_box, check_sides, find_outside, sides_of_box
from .point_cache import compute_once, is_constant


Part = Callable[[Tensor], Tensor] | float


class HardConstraint(nn.Module):
    r"""A network whose values are prescribed where `distance` is zero:

        u(x) = lift(x) + distance(x) kan(x).

    | prescribed | distance | lift |
    |---|---|---|
    | u = g on the boundary | 0 on the boundary, its normal derivative not | any extension of g |
    | u = f at t = 0 | t | f |
    | u = f and u_t = g at t = 0 | t^2 | f + t g |

    Products of distances satisfy several conditions at once; `BoxDistance` makes them for boxes.

    `jet`, `laplacian` and `hessian` use the product rule on the jet of the network, which keeps its closed form, and
    forward derivatives of `distance` and `lift`. It works on networks with adapters, and adapters can be made on it.

    Args:
        kan: A network, (..., I) to (..., O).
        distance: A number, or a function or module, x (..., I) to (..., 1) or (..., O), row by row, that
            `torch.func.jvp` differentiates twice.
        lift: The same; zero by default. A network as a lift continues its solution: freeze its parameters.

    Attributes:
        kan, distance, lift: The arguments.

    Raises:
        TypeError: `kan` is no module.
        ValueError: `distance` or `lift` is neither a function nor a finite number. In the forward pass and by `jet`:
            one of them returns another shape than (..., 1) or (..., O), or x is outside of the box of a `BoxDistance`.

    Source: I. E. Lagaris et al., "Artificial neural networks for solving ordinary and partial differential equations",
    IEEE Transactions on Neural Networks 9 (1998); N. Sukumar and A. Srivastava, arXiv 2104.08426.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> from peft_lotra.pde import HardConstraint
        >>> u = HardConstraint(KAN([1, 5, 1]), lambda x: 1 - x**2, lift=lambda x: x)
        >>> u(torch.tensor([[-1.0], [1.0]])).flatten().tolist()  # u(x) = x there
        [-1.0, 1.0]
        >>> value, slope, second = jet(u, torch.rand(10, 1))
    """

    def __init__(
        self,
        kan: nn.Module,
        distance: Part,
        lift: Part = 0.0,
    ) -> None:
        super().__init__()
        check_module(kan, "kan")
        self.kan = kan
        self.distance = _check_part("distance", distance)
        self.lift = _check_part("lift", lift)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (..., I) to outputs (..., O)."""
        values = self.kan(x)
        values = getattr(values, "logits", values)
        distance = self.part("distance", x, values)
        return self.part("lift", x, values) + distance * values

    def part(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        """Return the values of "distance" or "lift", for values (..., O) of the network."""
        function: Any = getattr(self, name)
        if not callable(function):
            return like.new_tensor(function)
        values: Any = function(x)
        _check_shape(name, values, like)
        return values


def _check_part(name: str, part: Any) -> Any:
    """Return a function as it is, and a number as a float; raise a `ValueError` for anything else."""
    if callable(part):
        return part
    number = as_number(part)
    if math.isnan(number):
        raise ValueError(
            f"`{name}` is {part!r:.100}, but must be a finite number, or a function of x: (..., I) to (..., O)."
        )
    return number


def _check_shape(name: str, values: Any, like: Tensor) -> None:
    """Raise a `ValueError` unless values broadcast to the network's outputs along the last dimension only."""
    shape = getattr(values, "shape", None)
    if shape not in (like.shape, (*like.shape[:-1], 1)):
        returned = type(values).__name__ if shape is None else tuple(shape)
        raise ValueError(
            f"`{name}` returns {returned} where the network returns {tuple(like.shape)}. Return the same, or one "
            "column: x[..., :1] keeps the last dimension, x[..., 0] does not."
        )


def _jet(
    model: HardConstraint,
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of lift + distance * network, along each direction, or in the weighted sum."""
    arguments = (x, directions, order, weights)
    network = jet_of_network(model.kan, *arguments)
    value, *derivatives = network

    def jet_of(name: str) -> Jet:
        function = getattr(model, name)
        if not callable(function):
            zeros = map(torch.zeros_like, derivatives)
            return [torch.full_like(value, function), *zeros]
        if is_constant(function):
            jet_of_part = compute_once(jet_of_function, function, *arguments)
        else:
            jet_of_part = jet_of_function(function, *arguments)
        _check_shape(name, jet_of_part[0], value)
        return jet_of_part

    product = multiply(network, jet_of("distance"), order, weights)
    return list(map(torch.add, jet_of("lift"), product))


def jet_of_function(function: Any, *arguments: Any) -> Jet:
    """Compute the jet of a network, or of a function: in closed form if there is one.

    `arguments` are those of `jet_of_network`.
    """
    if isinstance(function, nn.Module) and (composed_jet(function) or stages_of(function)):
        return jet_of_network(function, *arguments)
    return jet_by_transforms(function, *arguments)


def jet_of_network(
    model: nn.Module,
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the value and the derivatives of a network up to an order, which may be 0."""
    if order == 0:
        values = model(x)
        return [getattr(values, "logits", values)]
    collapse = False if weights is None else weights
    derivatives = jet(model, x, directions, order=order, collapse=collapse)
    return list(derivatives)


register(HardConstraint, Entry(jet=_jet))


class BoxDistance(nn.Module):
    r"""The distance function of sides of a box, for `HardConstraint`: the product over coordinates of

        s            for one of its sides,
        4 s (1 - s)  for both,

    where s in [0, 1] is the distance from the side as a share of the box's width. Sides in `twice` have s^2 for s.

    Args:
        low, high: The ends of the box, I numbers each.
        sides: Pairs (coordinate, end) of an index and "low" or "high"; None for all of them.
        twice: The subset of sides where the first derivative is prescribed too.

    Raises:
        ValueError: The box is empty, or a side is not one of its sides.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import BoxDistance
        >>> sides = [(0, "low"), (0, "high"), (1, "low")]  # walls, and t = 0
        >>> distance = BoxDistance((-1, 0), (1, 1), sides=sides)
        >>> x = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.3, 0.0]])
        >>> distance(x).flatten().tolist()
        [0.5, 0.0, 0.0]
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        sides: Sequence[Side] | None = None,
        twice: Sequence[Side] = (),
    ) -> None:
        super().__init__()
        low_end, high_end = check_box(low, high)
        self.register_buffer("low", low_end)
        self.register_buffer("high", high_end)
        self.sides = check_sides(sides, sides_of_box(len(low_end)))
        self.twice = check_sides(twice, self.sides, "twice")
        pairs = len(self.sides) - len({i for i, _ in self.sides})
        self.scale = 4**pairs

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., 1)."""
        distance = torch.full_like(x[..., :1], self.scale)
        for share in self.shares(x):
            distance = distance * share
        return distance

    def shares(self, x: Tensor) -> list[Tensor]:
        """Return the distances s from the sides, (..., 1) each, and again from those in `twice`."""
        self._check(x)
        width = (self.high - self.low).to(x)
        from_low = (x - self.low.to(x)) / width
        shares = []
        for i, end in (*self.sides, *self.twice):
            share = from_low[..., i : i + 1]
            shares.append(share if end == "low" else 1 - share)
        return shares

    def _check(self, x: Tensor) -> None:
        """Raise a `ValueError` if x is outside of the box, except in transforms and compiled functions."""
        if x.shape[-1:] != self.low.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, but the box has {len(self.low)} coordinates.")
        outside = find_outside(x, self.low, self.high)
        if outside:
            raise ValueError(f"x is outside of the box: {outside}")


def _jet_of_box(
    box: BoxDistance,
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of a product of factors that are linear along each direction."""
    value = torch.full_like(x[..., :1], box.scale)
    slopes = directions / (box.high - box.low).to(x)
    _, *counts = row_counts([value, slopes], order, weights)
    product = [value]
    for count in counts:
        product.append(x.new_zeros(count, *value.shape))

    sides = (*box.sides, *box.twice)
    for (i, end), share in zip(sides, box.shares(x), strict=True):
        slope = slopes[:, i].view(-1, *[1] * x.dim())
        if end == "high":
            slope = -slope
        factor = [share, slope, *map(torch.zeros_like, product[2:])]
        product = multiply(product, factor, order, weights)
    return product


register(BoxDistance, Entry(jet=_jet_of_box))
