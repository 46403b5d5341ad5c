# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The jet of a dense KAN layer, as one operation with a backward pass of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, is_batched
from ..kan.product import needs_plain_operations
from .bases import Basis, DenseFunctions, FunctionFeatures, tensors_of
from .splines import LocalSplines, SplineFeatures


# Up to so many outputs, coefficients are gathered; docs/notes/log.md.
MOST_OUTPUTS = 3

Directions = tuple[Tensor, Tensor | None, Tensor, Tensor]  # see `directional`


class LayerJet(torch.autograd.Function):
    """Maps z (I, N), z' (D, I, N), z'' (D or 1, I, N) or None, and coefficients (O, (K + 1) I) to y, y' and y'' (see
    `evaluate_layer`). The function `plain` of these four does the same by operations that autograd differentiates.

    The functions of the basis are evaluated in blocks of points that fit the cache. One block is kept for the
    backward pass; of several, only the arguments are, and the functions are evaluated again.

    With few outputs the functions on the edges, phi[o, i] = sum_k w[o, i, k] b_k, take the place of the basis: they
    are fewer than the basis functions. The coefficients w are gathered at each point.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, basis, weights, plain):
        counts = (1, len(first), len(first) if weights is None else 1)
        features = make_features(basis, z, len(weight) <= MOST_OUTPUTS)
        directions = directional(features.scale, first, second, weights)
        jet_rows = JetRows(directions, counts)
        ctx.orders, kept, on_edges = jet_rows.orders(any(ctx.needs_input_grad[:3])), (), ()
        if any(ctx.needs_input_grad) and z.shape[1] <= features.rows:
            kept = features.evaluate(z, ctx.orders)
        value = z.new_empty(len(weight), z.shape[1])  # no view, so that it may be changed in place
        first_y, second_y = (z.new_empty(number, *value.shape) for number in counts[1:])
        each = [value, *first_y, *second_y]
        for part, found in features.parts(z, ctx.orders if kept else jet_rows.orders(False), kept):
            if features.few_outputs:
                edges = _edges(weight, found)
                for row, result in zip(jet_rows.rows(edges, part), each, strict=True):
                    torch.sum(row, 1, out=result[:, part])
                on_edges = edges.functions.values() if kept else ()
            else:
                for number, matrix in found.matrices(jet_rows.rows(found, part)):
                    torch.mm(weight, matrix, out=each[number][:, part])
        directions = directions if kept else [None] * len(directions)
        ctx.save_for_backward(z, first, second, weight, weights, *directions, *on_edges, *kept, *tensors_of(basis))
        ctx.set_materialize_grads(False)
        ctx.features, ctx.plain, ctx.kept, ctx.on_edges = features, plain, len(kept), len(on_edges)
        return value, first_y, second_y

    @staticmethod
    def backward(ctx, grad_y, grad_dy, grad_d2y):  # pyright: ignore[reportIncompatibleMethodOverride] (*grad_outputs)
        z, first, second, weight, weights, *saved = ctx.saved_tensors
        on_edges = saved[4 : 4 + ctx.on_edges]
        kept = saved[4 + ctx.on_edges :][: ctx.kept]
        if needs_plain_gradients(grad_y, grad_dy, grad_d2y):
            return *plain_gradients(ctx, (grad_y, grad_dy, grad_d2y)), *[None] * 3
        grads = [() if grad_y is None else (grad_y,), *(() if g is None else g for g in (grad_dy, grad_d2y))]
        each = [part for group in grads for part in group]
        to_inputs = any(ctx.needs_input_grad[:3])
        results = [torch.zeros_like(p) if to_inputs and p is not None else None for p in (z, first, second)]
        # Transposed: the product that gives it so takes less time.
        to_weight = torch.zeros_like(weight.t()) if ctx.needs_input_grad[3] else None
        directions: Any = saved[:4] if kept else directional(ctx.features.scale, first, second, weights)
        jet_rows = JetRows(directions, tuple(map(len, grads)))
        for part, found in ctx.features.parts(z, ctx.orders, kept):
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
                towards = torch.stack(here).unsqueeze(2).expand(-1, -1, len(z), -1)
                jet_rows.add_input_gradients(results, edges, part, towards)
        if (scale := ctx.features.scale) is not None:
            results = [None if result is None else result.mul_(scale) for result in results]
        return *results, None if to_weight is None else to_weight.t(), *[None] * 3


def by_hand_pays(rows: int, x: Tensor, *others: Tensor | None) -> bool:
    """True for more than a few rows, outside of transforms and compilation, which need plain operations."""
    return rows > 64 and not needs_plain_operations(x, *others)


def make_features(basis: Basis, z: Tensor, few_outputs: bool = False) -> SplineFeatures | FunctionFeatures:
    """The functions of a basis, silu included for a uniform grid, for inputs z (I, N)."""
    return SplineFeatures(basis, z, few_outputs) if isinstance(basis, UniformGrid) else FunctionFeatures(basis, z)


def directional(scale: Tensor | None, first: Tensor, second: Tensor | None, weights: Tensor | None) -> Directions:
    """The derivatives that enter a layer, in inputs times `scale` (I, 1), the unit in which the functions are
    differentiated: z' (D, I, N), z'' (D or 1, I, N) or None, z' times the weights, and z'^2 or its weighted sum."""
    if scale is not None:
        first, second = first * scale, None if second is None else second * scale
    if weights is None:
        return first, second, first, first * first
    weighted = first * weights[:, None, None]
    square = weighted[:1] * first[:1]
    for one, other in zip(weighted[1:], first[1:], strict=True):
        square[0].addcmul_(one, other)
    return first, second, weighted, square


class JetRows:
    """The factors of the coefficients in a jet, which are `counts` (1 or 0, D or 0, S) rows f, f' z' and
    f'' z'^2 + f' z''."""

    def __init__(self, directions: Directions, counts: tuple[int, ...]) -> None:
        self.first, self.second, self.weighted, self.square = directions
        self.counts = counts

    def orders(self, gradients: bool) -> list[int]:
        """The orders of the derivatives that `rows` needs, and `add_input_gradients` if it will be called."""
        return list(range((3 if self.counts[2] else 1) + gradients))

    def rows(self, found: LocalSplines | DenseFunctions, part: slice) -> list[Tensor]:
        """The rows for the functions of a part of the points, each of their shape."""
        values, firsts, seconds = self.counts
        functions, rows = found.functions, found.memory("rows", firsts + seconds)
        if firsts:
            torch.mul(functions[1], self.first[..., part].unsqueeze(1), out=rows[:firsts])
        if seconds:
            torch.mul(functions[2], self.square[..., part].unsqueeze(1), out=rows[firsts:])
            if self.second is not None:
                rows[firsts:].addcmul_(functions[1], self.second[..., part].unsqueeze(1))
        return [*([functions[0]] if values else []), *rows]

    def add_input_gradients(
        self, results: Sequence[Tensor | None], found: LocalSplines | DenseFunctions, part: slice, towards: Tensor
    ) -> None:
        """Adds to `results` the gradients in z, z' and z'', from those `towards` the rows, which meet f', f'' and f'''
        in sums over the functions."""
        to_z, to_first, to_second = (None if result is None else result[..., part] for result in results)
        assert to_z is not None and to_first is not None
        values, firsts, seconds = self.counts
        first = self.first[..., part]

        def sums(start: int, stop: int, order: int) -> Tensor:
            each = zip(towards[start:stop].unbind(1), found.functions[order], strict=True)
            gradient, function = next(each)
            total = gradient * function
            for gradient, function in each:
                total.addcmul_(gradient, function)
            return total

        stop = values + firsts + (0 if self.second is None else seconds)
        of_value, of_first, of_second = sums(0, stop, 1).tensor_split([values, values + firsts])
        if values:
            to_z += of_value[0]
        if firsts:
            to_first += of_first
        if firsts or seconds:
            by_first, by_second = sums(values, len(towards), 2).tensor_split([firsts])
            for one, other in zip(by_first, first, strict=False):
                to_z.addcmul_(one, other)
        if seconds:
            to_first.addcmul_(by_second, self.weighted[..., part], value=2)
            for one, other in zip(sums(values + firsts, len(towards), 3), self.square[..., part], strict=True):
                to_z.addcmul_(one, other)
            if self.second is not None and to_second is not None:
                to_second += of_second
                for one, other in zip(by_second, self.second[..., part], strict=True):
                    to_z.addcmul_(one, other)


def _edges(weight: Tensor, found: LocalSplines | DenseFunctions) -> DenseFunctions:
    """The functions phi[o, i] on the edges, (O, I, R), in the place of the splines that they are sums of."""
    units = torch.eye(len(weight), dtype=weight.dtype, device=weight.device).unsqueeze(-1)
    local = found.towards(weight.t(), [*units])  # the coefficients of the splines at each point, (O, p + 2, I, R)
    return DenseFunctions({d: (local * functions).sum(1) for d, functions in found.functions.items()})


def needs_plain_gradients(*grads: Tensor | None) -> bool:
    """True if gradients are differentiated again, or belong to `is_grads_batched`."""
    return torch.is_grad_enabled() or any(grad is not None and is_batched(grad) for grad in grads)


def plain_gradients(ctx, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The gradients as differentiable functions of the inputs and of `grads`."""
    inputs = ctx.saved_tensors[:4]
    needed = ctx.needs_input_grad[:4]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        pairs = [(y, grad) for y, grad in zip(ctx.plain(*inputs), grads, strict=True) if grad is not None]
        if not pairs:
            return [None] * 4
        wanted = [part for part, asked in zip(inputs, needed, strict=True) if asked]
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=differentiable, allow_unused=True))
    return [next(found) if asked else None for asked in needed]
