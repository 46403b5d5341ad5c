# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Chain rule and product rule of any order, for a value with its derivatives along some directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..kan.product import sum_of_products


# A value (..., I) and its derivatives of the orders 1, 2, ... up to some n, (D, ..., I) along D directions. The list
# may end earlier if the last derivatives are zero. With weights (D,), the derivative of order n is the weighted sum
# over the directions, (1, ..., I).
Jet = list[Tensor]

Polynomials = dict[tuple[int, int], Tensor]  # (D, ...), by n and j, without those that are zero


def row_counts(
    jet: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
) -> list[int]:
    """Return the number of directions of each derivative up to an order, starting with 1 for the value."""
    if order == 0:
        return [1]
    counts = [1] + [len(jet[1])] * order
    if weights is not None:
        counts[-1] = 1
    return counts


def bell_polynomials(
    derivatives: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
) -> Polynomials:
    r"""Compute the polynomials B_nj in z', z'', ... of the n-th derivative of f(z) (Faà di Bruno):

        (f o z)^(n) = sum_j f^(j) B_nj,   B_n1 = z^(n),   B_nj = sum_i binom(n-1, i-1) z^(i) B_{n-i,j-1}.

    With weights, the polynomials of the highest order are weighted sums over the directions.
    """
    bells: Polynomials = {}
    for n in range(1, order + 1):
        if n <= len(derivatives):
            bells[n, 1] = derivatives[n - 1]
        for j in range(2, n + 1):
            pairs = []
            for i, derivative in enumerate(derivatives[: n - j + 1], 1):
                if (n - i, j - 1) in bells:
                    factor = times(bells[n - i, j - 1], math.comb(n - 1, i - 1))
                    pairs.append((derivative, factor))
            if pairs:
                bells[n, j] = sum_of_products(pairs)
                if weights is not None and n == order:
                    bells[n, j] = weigh(bells[n, j], weights).sum(0, keepdim=True)
    return bells


def compose(
    functions: Sequence[Tensor],
    derivatives: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of f(z), from f, f', ... at z."""
    bells = bell_polynomials(derivatives, order, weights)
    jet = [functions[0]]
    for n in range(1, order + 1):
        pairs = []
        for j in range(1, n + 1):
            if (n, j) in bells:
                pairs.append((functions[j], bells[n, j]))
        jet.append(sum_of_products(pairs))
    return jet


def multiply(
    left: Jet,
    right: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of a product: (f g)^(n) = sum_k binom(n, k) f^(k) g^(n-k), for jets that reach the order.

    `right` is the smaller factor.
    """
    product = [left[0] * right[0]]
    for n in range(1, order + 1):
        ends = [(left[0], right[n]), (left[n], right[0])]
        total = sum_of_products(ends)
        pairs = []
        for k in range(1, n):
            factor = times(right[n - k], math.comb(n, k))
            pairs.append((left[k], factor))
        if pairs:
            mixed = sum_of_products(pairs)
            if weights is not None and n == order:
                # in these terms no factor is a sum over the directions yet
                mixed = weigh(mixed, weights).sum(0, keepdim=True)
            total = total + mixed
        product.append(total)
    return product


def weigh(tensor: Tensor, weights: Tensor) -> Tensor:
    """Multiply each direction of (D, ...) by its weight."""
    ones = [1] * (tensor.dim() - 1)
    return tensor * weights.view(-1, *ones)


def times(tensor: Tensor, factor: int) -> Tensor:
    """Return the product, without an operation for 1."""
    return tensor if factor == 1 else tensor * factor
