# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Products of polynomials and waves of the coordinates of a box, and the grids on which they are fitted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.input_map import FirstMap
from .boxes import Inside, check_box, contains, warn_outside
from .point_cache import compute_once


MOST_CACHED = 2**27  # numbers in a jet that is kept for the points of a step: 1 GB


class BoxPolynomials(FirstMap):
    r"""Compute all products of functions of one coordinate each, of s in [0, 1] across the box:

        T_n(2 s - 1), n = 0, 1, ...                           Chebyshev polynomials,
        1, cos(2 pi s), sin(2 pi s), cos(4 pi s), ...         for a periodic coordinate.

    Solutions without layers or kinks need few of them: the error falls exponentially. `jet` and `LevenbergMarquardt`
    differentiate the layer in closed form. Inputs outside of the box warn once.

    Args:
        low, high: The ends of the box, I numbers each.
        periodic: The indices of periodic coordinates.
        counts: The number of functions of each coordinate.

    Attributes:
        out_features: The number of products. The functions of the last coordinate vary the fastest.

    Source: J. P. Boyd, "Chebyshev and Fourier Spectral Methods" (2001).
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        periodic: Collection[int],
        counts: Sequence[int],
    ) -> None:
        super().__init__()
        low_end, high_end = check_box(low, high)
        self.in_features = len(low_end)
        self.counts = list(counts)
        self.out_features = math.prod(counts)
        self.periodic = sorted(set(periodic))
        self.has_warned = False  # of inputs outside of the box
        self.register_buffer("low", low_end)
        self.register_buffer("high", high_end)

    def check(self, x: Tensor) -> None:
        """See `FirstMap`."""
        warn_outside(self, x)

    def jet(
        self,
        x: Tensor,
        directions: Tensor | None,
        order: int,
        weights: Tensor | None,
    ) -> list[Tensor]:
        """See `FirstMap`."""
        rows = 1 if directions is None else 1 + order * len(directions)
        if rows * len(x) * self.out_features > MOST_CACHED:
            return self._jet(x, directions, order, weights)
        return compute_once(BoxPolynomials._jet, self, x, directions, order, weights)

    def _jet(
        self,
        x: Tensor,
        directions: Tensor | None,
        order: int,
        weights: Tensor | None,
    ) -> list[Tensor]:
        """As `jet`, without a cache."""
        factors = [self._factors(i, x[:, i], order) for i in range(self.in_features)]
        jet = [_outer(factors, (0,) * len(factors))]
        if order == 0 or directions is None:
            return jet
        directions = directions.to(x)
        for n in range(1, order + 1):
            if weights is not None and n == order:
                terms = _terms(directions, n, weights)
                total = _sum_terms(factors, terms).unsqueeze(0)
            else:
                rows = [_sum_terms(factors, _terms(direction.unsqueeze(0), n)) for direction in directions]
                total = torch.stack(rows)
            jet.append(total)
        return jet

    def _factors(self, i: int, x: Tensor, highest: int) -> list[Tensor]:
        """Return the functions of coordinate i at x (N,), (N, count), and their derivatives up to an order."""
        width = (self.high[i] - self.low[i]).item()
        s = (x - self.low[i].to(x)) / width
        count = self.counts[i]
        if i in self.periodic:
            n = torch.arange(count).to(x)
            rate = 2 * math.pi * ((n + 1) / 2).floor()
            phase = n % 2 - 1  # a sine is the cosine a quarter turn behind
            phase[:1] = 0
            factors = []
            for order in range(highest + 1):
                # a derivative of the cosine is the cosine a quarter turn ahead
                angle = rate * s.unsqueeze(1) + math.pi / 2 * (phase + order)
                factors.append(torch.cos(angle) * (rate / width) ** order)
            return factors
        polynomials = _chebyshev(2 * s - 1, count, highest)
        return [polynomial * (2 / width) ** order for order, polynomial in enumerate(polynomials)]

    def extra_repr(self) -> str:
        box = f"low={self.low.tolist()}, high={self.high.tolist()}"
        return f"{box}, periodic={self.periodic}, counts={self.counts}"


def _chebyshev(z: Tensor, count: int, highest: int) -> list[Tensor]:
    """Return T_0 to T_{count - 1} at z (N,), (N, count), and their derivatives up to an order.

    T_{n+1}^(k) = 2 z T_n^(k) + 2 k T_n^(k-1) - T_{n-1}^(k).
    """
    derivatives: list[Tensor] = []
    for order in range(highest + 1):
        first = torch.full_like(z, 1.0 if order == 0 else 0.0)
        second = z if order == 0 else torch.full_like(z, 1.0 if order == 1 else 0.0)
        columns = [first, second]
        for n in range(1, count - 1):
            column = 2 * z * columns[-1] - columns[-2]
            if order > 0:
                column = column + 2 * order * derivatives[-1][:, n]
            columns.append(column)
        derivatives.append(torch.stack(columns[:count], 1))
    return derivatives


def _terms(
    directions: Tensor,
    order: int,
    weights: Tensor | None = None,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield the partial derivatives a (orders of the coordinates) in sum_d w_d (sum_i v_di d/dx_i)^n, with factors.

    The factor is n! / (a_1! a_2! ...) sum_d w_d v_d1^a_1 v_d2^a_2 ...
    """
    if weights is None:
        weights = directions.new_ones(len(directions))
    for orders in product(range(order + 1), repeat=directions.shape[1]):
        if sum(orders) != order:
            continue
        count = math.factorial(order) // math.prod(map(math.factorial, orders))
        powers = directions ** directions.new_tensor(orders)
        factor = count * (weights * powers.prod(1)).sum()
        yield orders, factor


def _sum_terms(factors: list[list[Tensor]], terms: Iterator[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Sum partial derivatives of the products, (N, K), without those whose factor is zero."""
    total = None
    for orders, factor in terms:
        if factor == 0:
            continue
        term = _outer(factors, orders, factor)
        total = term if total is None else total.add_(term)
    if total is None:
        return torch.zeros_like(_outer(factors, (0,) * len(factors)))
    return total


def _outer(
    factors: list[list[Tensor]],
    orders: Sequence[int],
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Return the products (N, K) of the derivatives of these orders, times a scale."""
    result = factors[0][orders[0]] * scale
    for i in range(1, len(orders)):
        result = (result.unsqueeze(2) * factors[i][orders[i]].unsqueeze(1)).flatten(1)
    return result


def new_polynomials(
    low: Sequence[float],
    high: Sequence[float],
    periodic: Collection[int],
    counts: Sequence[int],
    outputs: int,
    coefficients: Tensor | None = None,
) -> nn.Sequential:
    """Return a network of polynomials: `BoxPolynomials` and a matrix.

    Args:
        low, high, periodic, counts: As for `BoxPolynomials`.
        outputs: The number O of outputs.
        coefficients: (O, ...), one for each function of each coordinate. Those that are missing are zero.
    """
    polynomials = BoxPolynomials(low, high, periodic, counts)
    layer = nn.Linear(polynomials.out_features, outputs, bias=False, device="meta")  # without random numbers
    padded = torch.zeros(outputs, *counts, dtype=torch.float64, device="cpu")
    if coefficients is not None:
        shape = [min(pair) for pair in zip(coefficients.shape, padded.shape, strict=True)]
        common = tuple(slice(size) for size in shape)
        padded[common] = coefficients[common]
    layer.weight = nn.Parameter(padded.flatten(1))
    network: Any = nn.Sequential(polynomials, layer)
    box = polynomials.low.tolist(), polynomials.high.tolist()
    network.record = {"polynomials": [*box, polynomials.periodic, polynomials.counts, outputs]}
    return network


def coefficients_of(network: nn.Sequential) -> Tensor:
    """Return the coefficients of a network of polynomials, (O, ...): one for each function of each coordinate."""
    polynomials: Any = network[0]
    weight: Any = network[1].weight
    return weight.detach().view(-1, *polynomials.counts)


def grid_points(
    low: Tensor,
    high: Tensor,
    periodic: Collection[int],
    counts: Sequence[int],
    inside: Inside | None = None,
) -> Tensor:
    """Return the points of a grid with so many points along each coordinate, (n, I): those that are inside.

    They are the zeros of a Chebyshev polynomial, or equally far apart along a periodic coordinate.
    """
    lines = []
    for i, count in enumerate(counts):
        share = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
        if i not in periodic:
            share = (1 - torch.cos(math.pi * share)) / 2
        lines.append(torch.lerp(low[i], high[i], share))
    points = torch.cartesian_prod(*lines).view(-1, len(lines))
    if inside is not None:
        points = points[contains(inside, points)]
    return points
