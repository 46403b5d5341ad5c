# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The jet of a dense KAN layer, as one operation with a backward pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import comb

import torch
from torch import Tensor

from ..kan.basis import UniformGrid
from ..kan.formula import Basis
from ..kan.product import is_plain_backward, needs_plain_operations, plain_gradients
from .bases import DenseFunctions, FunctionFeatures, tensors_of
from .chain_rule import bell_polynomials, row_counts
from .splines import SplineFeatures


# Jet rows of all points. `least_squares.problem` tries a function with more points than these.
PLAIN_UP_TO = 64


class LayerJet(torch.autograd.Function):
    """Maps the coefficients as a matrix (O, (K + 1) I), and a jet, z (I, N) and (D or 1, I, N), to the jet of y up to
    an order, see `evaluate_layer`. The function `plain` of these does the same by operations that autograd
    differentiates.

    The functions of the basis are evaluated in blocks of points that fit the cache. One block is kept for the
    backward pass; of several, only the arguments are, and the functions are evaluated again.
    """

    @staticmethod
    def forward(ctx, basis, order, weights, plain, matrix, *jet):
        z = jet[0]
        features = make_features(basis, z)
        jet_rows = JetRows(features.scale, jet, order, weights, row_counts(jet, order, weights))
        ctx.orders, kept = jet_rows.orders(any(ctx.needs_input_grad[5:])), ()
        if any(ctx.needs_input_grad) and z.shape[1] <= features.rows:
            kept = features.evaluate(z, ctx.orders)
        value = z.new_empty(len(matrix), z.shape[1])  # no view, so that it may be changed in place
        derivatives = [z.new_empty(count, *value.shape) for count in jet_rows.counts[1:]]
        each = [value, *(row for part in derivatives for row in part.unbind())]
        for part, found in features.parts(z, ctx.orders if kept else jet_rows.orders(False), kept):
            for number, row in found.matrices(jet_rows.rows(found, part)):
                torch.mm(matrix, row, out=each[number][:, part])
        ctx.save_for_backward(matrix, weights, *jet, *kept, *tensors_of(basis))
        ctx.set_materialize_grads(False)
        ctx.features, ctx.plain, ctx.order, ctx.stops = features, plain, order, (len(jet), len(jet) + len(kept))
        return value, *derivatives

    @staticmethod
    def backward(ctx, *grads):
        matrix, weights, *saved = ctx.saved_tensors
        jet, kept = saved[: ctx.stops[0]], saved[slice(*ctx.stops)]
        if is_plain_backward(*grads):
            return *[None] * 4, *plain_gradients(ctx.plain, [matrix, *jet], ctx.needs_input_grad[4:], grads)
        groups = [() if grad is None else grad.unbind() if n else (grad,) for n, grad in enumerate(grads)]
        each = [part for group in groups for part in group]
        to_inputs = any(ctx.needs_input_grad[5:])
        results = [torch.zeros_like(part) if to_inputs else None for part in jet]
        # Transposed: the product that gives it so takes less time.
        to_matrix = torch.zeros_like(matrix.t()) if ctx.needs_input_grad[4] else None
        jet_rows = JetRows(ctx.features.scale, jet, ctx.order, weights, [len(group) for group in groups])
        for part, found in ctx.features.parts(jet[0], ctx.orders, kept):
            here = [gradient[:, part] for gradient in each]
            if to_matrix is not None:
                for number, row in found.matrices(jet_rows.rows(found, part)):
                    to_matrix.addmm_(row, here[number].t())
            if to_inputs:
                jet_rows.add_input_gradients(results, found, part, found.towards(matrix.t(), here))
        if (scale := ctx.features.scale) is not None:
            results = [None if result is None else result.mul_(scale) for result in results]
        return *[None] * 4, None if to_matrix is None else to_matrix.t(), *results


def by_hand_pays(jet: Sequence[Tensor], order: int, weights: Tensor | None, *others: Tensor | None) -> bool:
    """True for more than a few jet rows, outside of transforms and compilation, which need plain operations."""
    rows = len(jet[0]) * sum(row_counts(jet, order, weights))
    return rows > PLAIN_UP_TO and not needs_plain_operations(*jet, weights, *others)


def make_features(basis: Basis, z: Tensor) -> FunctionFeatures:
    """The functions of a basis, silu included for a uniform grid, for inputs z (I, N)."""
    return SplineFeatures(basis, z) if isinstance(basis, UniformGrid) else FunctionFeatures(basis, z)


class JetRows:
    """The factors of the coefficients in the jet of a layer, `counts` rows sum_j f^(j) B_nj for each order n, see
    `bell_polynomials`, in inputs times `scale` (I, 1), the unit in which the functions f are differentiated."""

    def __init__(
        self, scale: Tensor | None, jet: Sequence[Tensor], order: int, weights: Tensor | None, counts: list[int]
    ) -> None:
        derivatives = jet[1:] if scale is None else [part * scale for part in jet[1:]]
        self.bells, self.weighted = bell_polynomials(derivatives, order, weights)
        self.counts, self.order = counts, order

    def orders(self, gradients: bool) -> list[int]:
        """The orders of the derivatives that `rows` needs, and `add_input_gradients` if it will be called."""
        return list(range(self.order + 1 + gradients))

    def rows(self, found: DenseFunctions, part: slice) -> list[Tensor]:
        """The rows for the functions of a part of the points, each of their shape."""
        functions, rows = found.functions, found.memory("rows", sum(self.counts[1:]))
        groups, last = rows.split(self.counts[1:]) if self.order else (), 0
        for (n, j), bell in self.bells.items():
            if self.counts[n]:
                bell, group = bell[..., part].unsqueeze(1), groups[n - 1]
                torch.mul(functions[j], bell, out=group) if n > last else group.addcmul_(functions[j], bell)
                last = n
        return [*([functions[0]] if self.counts[0] else []), *rows.unbind()]

    def add_input_gradients(
        self, results: Sequence[Tensor | None], found: DenseFunctions, part: slice, towards: Tensor
    ) -> None:
        """Adds to `results` the gradients in z, z', ..., from those `towards` the rows, which meet f', f'', ... in
        sums over the functions: B_nj has the derivative binom(n, i) B_{n-i,j-1} in z^(i)."""
        to_each = [result[..., part] for result in results if result is not None]
        starts = [0, *accumulate(self.counts)]

        def sums(start: int, stop: int, order: int) -> Tensor:
            each = zip(towards[start:stop].unbind(1), found.functions[order], strict=True)
            gradient, function = next(each)
            total = gradient * function
            for gradient, function in each:
                total.addcmul_(gradient, function)
            return total

        for j in range(1, self.order + 2):
            # no one asks for the gradient in a derivative that is zero
            first, last = j - 1, len(to_each) - 1 if j == 1 else self.order
            if starts[first] == starts[last + 1]:
                continue
            groups = sums(starts[first], starts[last + 1], j).split(self.counts[first : last + 1])
            for n, group in enumerate(groups, first):
                if j == 1 and self.counts[n]:
                    to_each[n] += group if n else group[0]
                elif self.counts[n]:
                    self._add(to_each, group, n, j - 1, part)

    def _add(self, to_each: list[Tensor], group: Tensor, n: int, j: int, part: slice) -> None:
        """Adds what the factor f^(j+1) of n-th derivatives gives."""
        if (n, j) in self.bells:
            for one, other in zip(group.unbind(), self.bells[n, j][..., part].unbind(), strict=True):
                to_each[0].addcmul_(one, other)
        factors = self.weighted if n == self.order else self.bells
        for i in range(1, n - j + 1):
            if (n - i, j) in factors and i < len(to_each):
                to_each[i].addcmul_(group, factors[n - i, j][..., part], value=comb(n, i))
