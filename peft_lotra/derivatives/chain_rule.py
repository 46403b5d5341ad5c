# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Chain rule and product rule of any order, for a value with its derivatives along some directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor


# A value (..., I) and its derivatives of the orders 1, 2, ... up to some n, (D, ..., I) along D directions. Those that
# the list does not reach are zero. With weights (D,), the n-th is the weighted sum over the directions, (1, ..., I).
Jet = list[Tensor]

Polynomials = dict[tuple[int, int], Tensor]  # (D, ...), by n and j; those that are zero are left out


def row_counts(jet: Sequence[Tensor], order: int, weights: Tensor | None) -> list[int]:
    """The number of rows of each part up to an order, of a jet with a derivative or, for order 0, without."""
    counts = [1, *[len(jet[1]) if order else 0] * order]
    return counts if weights is None else [*counts[:-1], 1]


def bell_polynomials(
    derivatives: Sequence[Tensor], order: int, weights: Tensor | None
) -> tuple[Polynomials, Polynomials]:
    r"""The polynomials B_nj in z', z'', ... of the n-th derivative of f(z) (Faà di Bruno), and the same times weights:

        (f o z)^(n) = sum_j f^(j) B_nj,   B_n1 = z^(n),   B_nj = sum_i binom(n-1, i-1) z^(i) B_{n-i,j-1}.

    With weights, those of the highest order are summed over the directions.
    """
    found: Polynomials = {}
    weighted = found if weights is None else {}
    for n in range(1, order + 1):
        is_sum = weights is not None and n == order
        if n <= len(derivatives):
            found[n, 1] = derivatives[n - 1]
        for j in range(2, n + 1):
            pairs = [
                (part, times(weighted[n - i, j - 1] if is_sum else found[n - i, j - 1], math.comb(n - 1, i - 1)))
                for i, part in enumerate(derivatives[: n - j + 1], 1)
                if (n - i, j - 1) in found
            ]
            if is_sum and pairs:
                each = [zip(one.unbind(), other.unbind(), strict=True) for one, other in pairs]
                found[n, j] = sum_of_products(chain(*each)).unsqueeze(0)
            elif pairs:
                found[n, j] = sum_of_products(pairs)
        if weights is not None and not is_sum:
            bells = [((n, j), found[n, j]) for j in range(1, n + 1) if (n, j) in found]
            weighted.update({key: bell * weights.view(-1, *[1] * (bell.dim() - 1)) for key, bell in bells})
    return found, weighted


def compose(functions: Sequence[Tensor], derivatives: Sequence[Tensor], order: int, weights: Tensor | None) -> Jet:
    """The jet of f(z), from f, f', ... at z."""
    bells, _ = bell_polynomials(derivatives, order, weights)
    by_order = [[(functions[j], bell) for (m, j), bell in bells.items() if m == n] for n in range(1, order + 1)]
    return [functions[0], *map(sum_of_products, by_order)]


def multiply(one: Jet, other: Jet, order: int, weights: Tensor | None) -> Jet:
    """Compute the jet of a product: (f g)^(n) = sum_k binom(n, k) f^(k) g^(n-k), for jets that reach the order.

    `other` is the smaller factor.
    """
    product = [one[0] * other[0]]
    for n in range(1, order + 1):
        total = torch.addcmul(one[0] * other[n], one[n], other[0])
        if n > 1:
            factors = [times(other[n - k], math.comb(n, k)) for k in range(1, n)]
            at_top = weights if n == order else None
            if at_top is not None:
                factors = [factor * at_top.view(-1, *[1] * (factor.dim() - 1)) for factor in factors]
            mixed = sum_of_products(zip(one[1:n], factors, strict=True))
            total = total + (mixed if at_top is None else mixed.sum(0, keepdim=True))
        product.append(total)
    return product


def sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the products of pairs, at least one."""
    (one, other), *pairs = pairs
    total = one * other
    for one, other in pairs:
        total = torch.addcmul(total, one, other)
    return total


def times(part: Tensor, factor: int) -> Tensor:
    """The product, without an operation for 1."""
    return part if factor == 1 else part * factor
