# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Basis functions of one input with their derivatives: splines of any knots, Gaussians, polynomials, harmonics.

Each returns the values and the derivatives up to the order `highest`, in a list. For z of any shape (...),
a derivative is (..., K), a view of memory in which the K functions come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, logistic_derivatives
from ..kan.formula import Basis, FunctionBasis
from ..kan.memory import JET_BLOCK, OFF_CPU, blocks, workspace
from .torch_fallback import elementwise_derivatives


def num_functions(basis: Basis) -> int:
    """The number of functions of a basis; those of a uniform grid include silu, as the last one."""
    return basis.num_basis + 1 if isinstance(basis, UniformGrid) else basis.size


def evaluate_functions(basis: FunctionBasis, z: Tensor, highest: int) -> list[Tensor]:
    """Return the functions at z (I, N) and their derivatives up to the order `highest`, each (K, I, N)."""
    x = z.T
    values = basis.derivatives(x, highest)
    missing = highest + 1 - len(values)
    if missing > 0:
        last = len(values) - 1
        values = [*values[:-1], *elementwise_derivatives(lambda x: basis.derivatives(x, last)[last], x, missing)]
    return [part.permute(2, 1, 0) for part in values]


def tensors_of(basis: Basis) -> list[Tensor]:
    """The tensors that the functions depend on besides the inputs, for `save_for_backward`, which notices changes."""
    tensors = (basis.low, basis.high) if isinstance(basis, UniformGrid) else basis.tensors
    return [tensor for tensor in tensors if not tensor.is_inference()]  # which cannot be saved


class FunctionFeatures:
    """The K functions of a basis, and derivatives of them, for inputs z (I, N) in blocks of rows.

    Attributes:
        shape: (K, I).
        scale: The unit of the inputs in which functions are differentiated, its inverse (I, 1); None for 1.
        rows: How many rows are evaluated at a time.
    """

    scale: Tensor | None = None

    def __init__(self, basis: Any, z: Tensor) -> None:
        self.basis, self.shape = basis, (num_functions(basis), len(z))
        block = JET_BLOCK if z.device.type == "cpu" else OFF_CPU
        self.rows = max(128, block // max(1, math.prod(self.shape)))

    def evaluate(self, z: Tensor, orders: Sequence[int]) -> list[Tensor]:
        """The derivatives of these orders at z (I, rows), each (K, I, rows)."""
        with torch.no_grad():
            found = evaluate_functions(self.basis, z, max(orders))
        return [found[d].contiguous() for d in orders]

    def functions(self, orders: Sequence[int], found: Sequence[Tensor]) -> DenseFunctions:
        """The functions of a block, from the results of `evaluate`."""
        return DenseFunctions(dict(zip(orders, found, strict=False)))

    def parts(
        self, z: Tensor, orders: Sequence[int], kept: Sequence[Tensor]
    ) -> Iterator[tuple[slice, DenseFunctions]]:
        """The functions for blocks of the rows of z (I, N), of about the same size, from what `evaluate` gave for all
        rows and these orders, if that was kept."""
        rows = z.shape[1]
        count = max(1, -(-rows // self.rows))
        for block in blocks(0, rows, max(1, -(-rows // count))):
            yield block, self.functions(orders, kept or self.evaluate(z[:, block], orders))


class DenseFunctions:
    """All functions for a block of rows, by order of the derivative (K, I, R); see `LocalSplines`."""

    def __init__(self, functions: dict[int, Tensor]) -> None:
        self.functions = functions
        self.like = functions[0]

    def memory(self, name: str, count: int) -> Tensor:
        """For `count` tensors of the shape of the functions."""
        return workspace(name, self.like, count, *self.like.shape)

    def matrices(self, rows: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Tensors (K, I, R) as matrices (K I, R), each with its number."""
        yield from enumerate(row.flatten(0, 1) for row in rows)

    def towards(self, transposed: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """The products of (K I, O) and (O, R): (S, K, I, R)."""
        found = self.memory("towards", len(gradients))
        for one, gradient in zip(found, gradients, strict=True):
            torch.mm(transposed, gradient, out=one.flatten(0, 1))
        return found


def spline_derivatives(
    knots: Tensor, order: int, z: Tensor, highest: int, closed: Tensor | None = None
) -> list[Tensor]:
    """The M - 1 - order B-splines of degree `order` on knots (I, M), for z (N, I), by the Cox-de Boor recursion.

    The derivatives are differences of the splines of lower degree. Terms of knots that coincide are zero. `closed`
    (I,) names for each input the interval that includes its right end.
    """
    x, knots = z.T.unsqueeze(0), knots.T.contiguous().unsqueeze(-1)  # (1, I, N), (M, I, 1)
    inside = (knots[:-1] <= x) & (x < knots[1:])
    if closed is not None:
        here = torch.arange(len(inside), device=z.device)[:, None, None] == closed[:, None]
        inside = inside | (here & (x == knots[1:]))
    basis = inside.to(z.dtype)
    by_degree = [basis]
    for p in range(1, order + 1):
        span = knots[p:] - knots[:-p]
        ramp = (x - knots[:-p]) * _inverse(span)
        rest = torch.where(span == 0, torch.zeros_like(span), torch.ones_like(span))
        basis = ramp[:-1] * basis[:-1] + (rest - ramp)[1:] * basis[1:]
        by_degree.append(basis)
    found = []
    for d in range(min(highest, order) + 1):
        part = by_degree[order - d]
        for p in range(order - d + 1, order + 1):
            scaled = part * (p * _inverse(knots[p:] - knots[:-p]))
            part = scaled[:-1] - scaled[1:]
        found.append(part)
    found += [torch.zeros_like(basis)] * (highest - order)
    return [part.permute(2, 1, 0) for part in found]


def _inverse(span: Tensor) -> Tensor:
    return torch.where(span == 0, torch.zeros_like(span), 1 / torch.where(span == 0, torch.ones_like(span), span))


def gaussian_derivatives(centers: Tensor, width: Any, z: Tensor, highest: int) -> list[Tensor]:
    """exp(-((z - c) / width)^2) for centers c (K,)."""
    half, rate = _offsets(z / 2, centers / 2), 2 / (width * width)
    slope = half * (-2 * rate)  # of the exponent
    value = (half * slope).exp_()
    found = [value]
    if highest >= 1:
        found.append(slope * value)
    for d in range(2, highest + 1):
        part, factor = slope * found[-1], (d - 1) * rate
        is_learned = isinstance(factor, Tensor)
        found.append(part.sub_(found[-2] * factor) if is_learned else part.sub_(found[-2], alpha=factor))
    return _functions_last(found)


def bump_derivatives(centers: Tensor, z: Tensor, highest: int) -> list[Tensor]:
    """1 - tanh(z - c)^2 for centers c (K,)."""
    found = logistic_derivatives(torch.tanh(_offsets(z, centers)), highest + 1, of_tanh=True)  # bumps are its slopes
    return _functions_last(found[1:])


def chebyshev_derivatives(degree: int, z: Tensor, highest: int) -> list[Tensor]:
    """The Chebyshev polynomials T_0 ... T_degree of tanh(z)."""
    u = torch.tanh(z)
    of_u = logistic_derivatives(u, highest, of_tanh=True)
    zeros = torch.zeros_like(u)
    rows = [[torch.ones_like(u) if d == 0 else zeros] for d in range(highest + 1)]
    for n in range(1, degree + 1):
        for d in range(highest + 1):  # T_n = 2 u T_{n-1} - T_{n-2}, differentiated d times
            value = zeros if n == 1 else -rows[d][n - 2]
            for e in range(d + 1):
                value = torch.addcmul(value, of_u[e], rows[d - e][n - 1], value=min(n, 2) * math.comb(d, e))
            rows[d].append(value)
    return _functions_last([_functions_first(row) for row in rows])


def harmonic_derivatives(count: int, z: Tensor, highest: int) -> list[Tensor]:
    """cos(k z) for k = 1 ... count, and then sin(k z)."""
    k = torch.arange(1, count + 1, dtype=z.dtype, device=z.device).view(-1, *[1] * z.dim())
    cosine, sine = torch.cos(k * z), torch.sin(k * z)
    cycle = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)]
    return _functions_last(
        [_functions_first([*(k**d * cycle[d % 4][0]), *(k**d * cycle[d % 4][1])]) for d in range(highest + 1)]
    )


def _offsets(z: Tensor, centers: Tensor) -> Tensor:
    return z - centers.view(-1, *[1] * z.dim())


def _functions_first(parts: Sequence[Tensor]) -> Tensor:
    """The values of functions, each of the shape of z, as one tensor that has the order of z in memory."""
    if parts[0].dim() == 2 and not parts[0].is_contiguous():
        return torch.stack([part.mT for part in parts]).mT
    return torch.stack(list(parts))


def _functions_last(parts: Sequence[Tensor]) -> list[Tensor]:
    return [part.movedim(0, -1) for part in parts]
