# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Basis functions of one input with their derivatives: splines of any knots, Gaussians, polynomials, harmonics.

Each function returns a list of the values and the derivatives up to the order `highest`. For z of any shape (...),
each is (..., K), a view of memory in which the K functions come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, logistic_derivatives
from ..kan.formula import Basis, FunctionBasis
from ..kan.memory import JET_BLOCK, OFF_CPU, blocks, workspace
from .chain_rule import multiply
from .torch_fallback import elementwise_derivatives


def num_functions(basis: Basis) -> int:
    """Return the number of functions of a basis. A uniform grid has silu too, as the last one."""
    return basis.num_basis + 1 if isinstance(basis, UniformGrid) else basis.size


def evaluate_functions(basis: FunctionBasis, z: Tensor, highest: int) -> list[Tensor]:
    """Return the functions at z (I, N) and their derivatives up to the order `highest`, each (K, I, N)."""
    points = z.T
    functions = basis.derivatives(points, highest)
    last = len(functions) - 1
    if last < highest:
        last_function = lambda x: basis.derivatives(x, last)[last]  # noqa: E731
        missing = elementwise_derivatives(last_function, points, highest - last)
        functions = [*functions[:-1], *missing]
    return [function.permute(2, 1, 0) for function in functions]


class FunctionFeatures:
    """The K functions of a basis and their derivatives, for inputs z (I, N) in blocks of points.

    Attributes:
        shape: (K, I).
        scale: The unit of the inputs in which functions are differentiated, its inverse (I, 1). None for 1.
        block_size: How many points are evaluated at a time.
        functions: The result of `evaluate` for the present block of `blocks`.
    """

    scale: Tensor | None = None

    def __init__(self, basis: Any, z: Tensor) -> None:
        self.basis = basis
        self.shape = (num_functions(basis), len(z))
        self.functions: Sequence[Tensor] = ()
        size = JET_BLOCK if z.device.type == "cpu" else OFF_CPU
        values_per_point = max(1, math.prod(self.shape))
        self.block_size = max(128, size // values_per_point)

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """Return the values and the derivatives up to an order at z (I, R), each (K, I, R)."""
        with torch.no_grad():
            functions = evaluate_functions(self.basis, z, highest)
        return list(map(Tensor.contiguous, functions))

    def blocks(
        self,
        z: Tensor,
        highest: int,
        evaluated: Sequence[Tensor] = (),
    ) -> Iterator[slice]:
        """Yield blocks of the points z (I, N), whose functions are then in `functions`.

        Args:
            z: The points.
            highest: The highest order of the derivatives.
            evaluated: The result of `evaluate` for all points, if it is known.
        """
        for block in blocks(z.shape[1], self.block_size):
            self.functions = evaluated or self.evaluate(z[:, block], highest)
            yield block

    def memory(self, name: str, count: int) -> Tensor:
        """Return memory for `count` tensors of the shape of the functions."""
        like = self.functions[0]
        return workspace(name, like, count, *like.shape)

    def matrices(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield tensors (K, I, R) as matrices (K I, R)."""
        for row in rows:
            yield row.flatten(0, 1)

    def pull_back(self, transposed: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Return the products of (K I, O) and each gradient (O, R), (S, K, I, R)."""
        products = self.memory("pull_back", len(gradients))
        for product, gradient in zip(products, gradients, strict=True):
            torch.mm(transposed, gradient, out=product.flatten(0, 1))
        return products


def spline_derivatives(
    knots: Tensor,
    order: int,
    z: Tensor,
    highest: int,
    closed: Tensor | None = None,
) -> list[Tensor]:
    """Evaluate the M - 1 - order B-splines of degree `order` on knots (I, M), by the Cox-de Boor recursion.

    Args:
        knots: Terms of knots that coincide are zero.
        order: The degree.
        z: The points, (N, I).
        highest: The highest order of the derivatives.
        closed: For each input the interval that includes its right end, (I,).
    """
    x = z.T  # (I, N)
    knots = knots.T.contiguous().unsqueeze(-1)  # (M, I, 1)
    start = knots[:-1]
    end = knots[1:]
    is_inside = (start <= x) & (x < end)
    if closed is not None:
        numbers = torch.arange(len(start), device=z.device)
        is_closed = numbers[:, None, None] == closed[:, None]
        is_inside = is_inside | (is_closed & (x == end))

    derivatives = [is_inside.to(z.dtype)]
    for degree in range(1, order + 1):
        start = knots[:-degree]
        end = knots[degree:]
        span = end - start
        inverse = span.masked_fill(span == 0, math.inf).reciprocal()
        rising = (x - start) * inverse
        falling = (end - x) * inverse
        lower = derivatives[0]
        from_left = rising[:-1] * lower[:-1]
        from_right = falling[1:] * lower[1:]
        splines = from_left + from_right
        # the derivatives are differences of splines of lower degree
        needed = max(0, highest - (order - degree))
        previous = derivatives[:needed]
        derivatives = [splines]
        for derivative in previous:
            slope = derivative * (degree * inverse)
            derivatives.append(slope[:-1] - slope[1:])
    zero = torch.zeros_like(derivatives[0])
    derivatives += [zero] * (highest - order)
    return [derivative.permute(2, 1, 0) for derivative in derivatives]


def gaussian_derivatives(
    centers: Tensor,
    width: Any,
    z: Tensor,
    highest: int,
) -> list[Tensor]:
    """Evaluate exp(-((z - c) / width)^2) for centers c (K,)."""
    half = z / 2 - _before_dims(centers / 2, z)
    rate = 2 / (width * width)
    slope = half * (-2 * rate)  # of the exponent
    derivatives = [(half * slope).exp_()]
    for n in range(highest):
        derivative = slope * derivatives[n]
        if n > 0:
            derivative = derivative - derivatives[n - 1] * (n * rate)
        derivatives.append(derivative)
    return _functions_last(derivatives)


def bump_derivatives(centers: Tensor, z: Tensor, highest: int) -> list[Tensor]:
    """Evaluate 1 - tanh(z - c)^2, the slope of tanh, for centers c (K,)."""
    distances = z - _before_dims(centers, z)
    _, *derivatives = logistic_derivatives(torch.tanh, distances, highest + 1)
    return _functions_last(derivatives)


def chebyshev_derivatives(degree: int, z: Tensor, highest: int) -> list[Tensor]:
    """Evaluate the Chebyshev polynomials T_0 ... T_degree of u = tanh(z)."""
    u = logistic_derivatives(torch.tanh, z, highest)
    zero = torch.zeros_like(z)
    polynomials = [[torch.ones_like(z), *[zero] * highest], u]
    for _ in range(degree - 1):
        products = multiply(polynomials[-1], u, highest, None)
        # T_n = 2 u T_{n-1} - T_{n-2}
        pairs = zip(products, polynomials[-2], strict=True)
        polynomials.append([2 * product - lower for product, lower in pairs])
    polynomials = polynomials[: degree + 1]
    derivatives = map(_functions_first, zip(*polynomials, strict=True))
    return _functions_last(derivatives)


def harmonic_derivatives(count: int, z: Tensor, highest: int) -> list[Tensor]:
    """Evaluate cos(k z) for k = 1 ... count, and then sin(k z)."""
    k = torch.arange(1, count + 1, dtype=z.dtype, device=z.device)
    k = _before_dims(k, z)
    cosine = torch.cos(k * z)
    sine = torch.sin(k * z)
    derivatives = []
    for _ in range(highest + 1):
        functions = _functions_first([*cosine, *sine])
        derivatives.append(functions)
        cosine, sine = -k * sine, k * cosine
    return _functions_last(derivatives)


def _before_dims(values: Tensor, z: Tensor) -> Tensor:
    """Return values (K,) with a dimension of length one for each dimension of z."""
    return values.view(-1, *[1] * z.dim())


def _functions_first(functions: Sequence[Tensor]) -> Tensor:
    """Stack functions of the shape of z, in the order of z in memory."""
    if functions[0].dim() == 2 and not functions[0].is_contiguous():
        return torch.stack([function.mT for function in functions]).mT
    return torch.stack(list(functions))


def _functions_last(derivatives: Iterable[Tensor]) -> list[Tensor]:
    return [derivative.movedim(0, -1) for derivative in derivatives]
