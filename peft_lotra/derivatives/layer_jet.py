# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The jet of a dense KAN layer, as one operation with a backward pass of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import comb

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, is_batched
from ..kan.product import needs_plain_operations
from .bases import Basis, DenseFunctions, FunctionFeatures, tensors_of
from .chain_rule import Polynomials, bell_polynomials, row_counts
from .splines import LocalSplines, SplineFeatures


# Up to so many outputs, coefficients are gathered; docs/notes/log.md.
MOST_OUTPUTS = 3


class LayerJet(torch.autograd.Function):
    """Maps coefficients (O, (K + 1) I) and a jet, z (I, N) and (D or 1, I, N), to the jet of y up to an order, see
    `evaluate_layer`. The function `plain` of these does the same by operations that autograd differentiates.

    The functions of the basis are evaluated in blocks of points that fit the cache. One block is kept for the
    backward pass; of several, only the arguments are, and the functions are evaluated again.

    With few outputs the functions on the edges, phi[o, i] = sum_k w[o, i, k] b_k, take the place of the basis: they
    are fewer than the basis functions. The coefficients w are gathered at each point.
    """

    @staticmethod
    def forward(ctx, basis, order, weights, plain, weight, *jet):
        z = jet[0]
        features = make_features(basis, z, len(weight) <= MOST_OUTPUTS)
        polynomials = scaled_polynomials(features.scale, jet, order, weights)
        jet_rows = JetRows(*polynomials, row_counts(order, len(jet[1]) if order else 0, weights))
        ctx.orders, kept, on_edges = jet_rows.orders(any(ctx.needs_input_grad[5:])), (), ()
        if any(ctx.needs_input_grad) and z.shape[1] <= features.rows:
            kept = features.evaluate(z, ctx.orders)
        value = z.new_empty(len(weight), z.shape[1])  # no view, so that it may be changed in place
        derivatives = [z.new_empty(count, *value.shape) for count in jet_rows.counts[1:]]
        each = [value, *(row for part in derivatives for row in part.unbind())]
        for part, found in features.parts(z, ctx.orders if kept else jet_rows.orders(False), kept):
            if features.few_outputs:
                edges = _edges(weight, found)
                for row, result in zip(jet_rows.rows(edges, part), each, strict=True):
                    torch.sum(row, 1, out=result[:, part])
                on_edges = edges.functions.values() if kept else ()
            else:
                for number, matrix in found.matrices(jet_rows.rows(found, part)):
                    torch.mm(weight, matrix, out=each[number][:, part])
        ctx.keys = [tuple(found) for found in polynomials] if kept else []
        bells = [found[key] for found, keys in zip(polynomials, ctx.keys, strict=False) for key in keys]
        ctx.save_for_backward(weight, *jet, weights, *bells, *on_edges, *kept, *tensors_of(basis))
        ctx.set_materialize_grads(False)
        ctx.features, ctx.plain, ctx.order = features, plain, order
        ctx.sizes = len(jet), len(on_edges), len(kept)
        return value, *derivatives

    @staticmethod
    def backward(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        weight, jet, weights = next(saved), [next(saved) for _ in range(ctx.sizes[0])], next(saved)
        polynomials = [{key: next(saved) for key in keys} for keys in ctx.keys]
        on_edges, kept = ([next(saved) for _ in range(size)] for size in ctx.sizes[1:])
        # differentiated again, or of `is_grads_batched`
        if torch.is_grad_enabled() or any(grad is not None and is_batched(grad) for grad in grads):
            return *[None] * 4, *plain_gradients(ctx, [weight, *jet], grads)
        groups = [() if grad is None else grad.unbind() if n else (grad,) for n, grad in enumerate(grads)]
        each = [part for group in groups for part in group]
        to_inputs = any(ctx.needs_input_grad[5:])
        results = [torch.zeros_like(part) if to_inputs else None for part in jet]
        # Transposed: the product that gives it so takes less time.
        to_weight = torch.zeros_like(weight.t()) if ctx.needs_input_grad[4] else None
        polynomials = polynomials or scaled_polynomials(ctx.features.scale, jet, ctx.order, weights)
        jet_rows = JetRows(*polynomials, [len(group) for group in groups])
        for part, found in ctx.features.parts(jet[0], ctx.orders, kept):
            here = [gradient[:, part] for gradient in each]
            if not ctx.features.few_outputs:
                if to_weight is not None:
                    for number, matrix in found.matrices(jet_rows.rows(found, part)):
                        to_weight.addmm_(matrix, here[number].t())
                if to_inputs:
                    jet_rows.add_input_gradients(results, found, part, found.towards(weight.t(), here))
                continue
            if to_weight is not None:
                rows = jet_rows.rows(found, part)
                for output in range(len(weight)):
                    summed = torch.zeros_like(rows[0])
                    for row, gradient in zip(rows, here, strict=True):
                        summed.addcmul_(row, gradient[output])
                    to_weight[:, output] += found.sums(summed)
            if to_inputs:
                kept_edges = dict(zip(ctx.orders, on_edges, strict=False))
                edges = DenseFunctions(kept_edges) if kept_edges else _edges(weight, found)
                towards = torch.stack(here).unsqueeze(2).expand(-1, -1, len(jet[0]), -1)
                jet_rows.add_input_gradients(results, edges, part, towards)
        if (scale := ctx.features.scale) is not None:
            results = [None if result is None else result.mul_(scale) for result in results]
        return *[None] * 4, None if to_weight is None else to_weight.t(), *results


def by_hand_pays(rows: int, x: Tensor, *others: Tensor | None) -> bool:
    """True for more than a few rows, outside of transforms and compilation, which need plain operations."""
    return rows > 64 and not needs_plain_operations(x, *others)


def make_features(basis: Basis, z: Tensor, few_outputs: bool = False) -> SplineFeatures | FunctionFeatures:
    """The functions of a basis, silu included for a uniform grid, for inputs z (I, N)."""
    return SplineFeatures(basis, z, few_outputs) if isinstance(basis, UniformGrid) else FunctionFeatures(basis, z)


def scaled_polynomials(
    scale: Tensor | None, jet: Sequence[Tensor], order: int, weights: Tensor | None
) -> tuple[Polynomials, Polynomials]:
    """The polynomials of a jet (D or 1, I, N) in inputs times `scale` (I, 1), the unit in which the functions are
    differentiated."""
    return bell_polynomials(jet[1:] if scale is None else [part * scale for part in jet[1:]], order, weights)


class JetRows:
    """The factors of the coefficients in the jet of a layer, `counts` rows sum_j f^(j) B_nj for each order n, see
    `bell_polynomials`."""

    def __init__(self, bells: Polynomials, weighted: Polynomials, counts: list[int]) -> None:
        self.bells, self.weighted, self.counts = bells, weighted, counts
        self.order = len(counts) - 1

    def orders(self, gradients: bool) -> list[int]:
        """The orders of the derivatives that `rows` needs, and `add_input_gradients` if it will be called."""
        return list(range(self.order + 1 + gradients))

    def rows(self, found: LocalSplines | DenseFunctions, part: slice) -> list[Tensor]:
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
        self, results: Sequence[Tensor | None], found: LocalSplines | DenseFunctions, part: slice, towards: Tensor
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


def _edges(weight: Tensor, found: LocalSplines | DenseFunctions) -> DenseFunctions:
    """The functions phi[o, i] on the edges, (O, I, R), in the place of the splines that they are sums of."""
    units = torch.eye(len(weight), dtype=weight.dtype, device=weight.device).unsqueeze(-1)
    local = found.towards(weight.t(), [*units])  # the coefficients of the splines at each point, (O, p + 2, I, R)
    return DenseFunctions({d: (local * functions).sum(1) for d, functions in found.functions.items()})


def plain_gradients(ctx, inputs: Sequence[Tensor], grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The gradients as differentiable functions of the inputs, the last arguments, and of `grads`."""
    needed = ctx.needs_input_grad[-len(inputs) :]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        pairs = [(y, grad) for y, grad in zip(ctx.plain(*inputs), grads, strict=True) if grad is not None]
        if not pairs:
            return [None] * len(inputs)
        wanted = [part for part, asked in zip(inputs, needed, strict=True) if asked]
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=differentiable, allow_unused=True))
    return [next(found) if asked else None for asked in needed]
