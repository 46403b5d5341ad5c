# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Chain rule and product rule of any order, for a value with its derivatives along some directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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
) -> tuple[Polynomials, Polynomials]:
    r"""Compute the polynomials B_nj in z', z'', ... of the n-th derivative of f(z) (Faà di Bruno):

        (f o z)^(n) = sum_j f^(j) B_nj,   B_n1 = z^(n),   B_nj = sum_i binom(n-1, i-1) z^(i) B_{n-i,j-1}.

    Returns:
        The polynomials, and the same times the weights. With weights, the polynomials of the highest order are sums
        over the directions.
    """
    bells: Polynomials = {}
    weighted = bells if weights is None else {}
    for n in range(1, order + 1):
        # the weighted sum is linear in one factor of each product: weights on that factor are enough
        is_sum = weights is not None and n == order
        factors = weighted if is_sum else bells
        if n <= len(derivatives):
            bells[n, 1] = derivatives[n - 1]
        for j in range(2, n + 1):
            pairs = []
            for i, derivative in enumerate(derivatives[: n - j + 1], 1):
                factor = factors.get((n - i, j - 1))
                if factor is not None:
                    factor = times(factor, math.comb(n - 1, i - 1))
                    pairs.append((derivative, factor))
            if pairs and is_sum:
                bells[n, j] = _sum_over_directions(pairs)
            elif pairs:
                bells[n, j] = sum_of_products(pairs)

        # the factors of the highest order
        if weights is not None and not is_sum:
            for j in range(1, n + 1):
                if (n, j) in bells:
                    weighted[n, j] = _weigh(bells[n, j], weights)
    return bells, weighted


def compose(
    functions: Sequence[Tensor],
    derivatives: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of f(z), from f, f', ... at z."""
    bells, _ = bell_polynomials(derivatives, order, weights)
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
        first = left[0] * right[n]
        total = torch.addcmul(first, left[n], right[0])
        pairs = []
        for k in range(1, n):
            factor = times(right[n - k], math.comb(n, k))
            pairs.append((left[k], factor))
        if pairs and weights is not None and n == order:
            # in these terms no factor is a sum over the directions yet
            pairs = [(factor, _weigh(other, weights)) for factor, other in pairs]
            total = total + sum_of_products(pairs).sum(0, keepdim=True)
        elif pairs:
            total = total + sum_of_products(pairs)
        product.append(total)
    return product


def sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of the products of one or more pairs."""
    (left, right), *pairs = pairs
    total = left * right
    for left, right in pairs:
        total = torch.addcmul(total, left, right)
    return total


def _sum_over_directions(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of the products of pairs (D, ...) over the pairs and the directions, (1, ...)."""
    pairs_of_directions: list[tuple[Tensor, Tensor]] = []
    for left, right in pairs:
        pairs_of_directions += zip(left.unbind(), right.unbind(), strict=True)
    return sum_of_products(pairs_of_directions).unsqueeze(0)


def _weigh(tensor: Tensor, weights: Tensor) -> Tensor:
    """Multiply each direction of (D, ...) by its weight."""
    ones = [1] * (tensor.dim() - 1)
    return tensor * weights.view(-1, *ones)


def times(tensor: Tensor, factor: int) -> Tensor:
    """Return the product, without an operation for 1."""
    return tensor if factor == 1 else tensor * factor
