# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a dense KAN layer makes of a jet, as one operation with a hand-written backward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..basis import TruncatedPowers, UniformGrid, integer_power, silu_derivatives
from ..memory import JET_BLOCK, OFF_CPU, blocks
from .functions import Basis, FunctionFeatures


class LayerJet(torch.autograd.Function):
    """z (I, N), z' (D, I, N), z'' (D or 1, I, N) or None, and coefficients (O, (K + 1) I) to y, y' and y'', see
    `evaluate_layer`. The function `plain` of these four does the same by operations that autograd differentiates.

    Only the arguments are kept. Features are evaluated in blocks of rows that fit the cache, and again in backward.
    Each of the jet rows f, f' z' and f'' z'^2 + f' z'' goes through the matrix product by itself, so that one buffer
    serves them all. The gradient of a jet row meets f', f'' and f''' in sums over the basis functions.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, grid, weights, only_second, plain):
        rows, outputs = z.shape[1], len(weight)
        features = make_features(grid, z)
        seconds = len(first) if weights is None else 1
        y = dy = None
        if not only_second:
            y, dy = z.new_empty(outputs, rows), z.new_empty(len(first), outputs, rows)
        d2y = z.new_empty(seconds, outputs, rows)
        for block in features.blocks(rows):
            jet_rows = JetRows(features, block, z, first, second, weights, range(1 if only_second else 0, 3))
            if y is not None and dy is not None:
                torch.mm(weight, jet_rows.value(), out=y[:, block])
                for d in range(len(first)):
                    torch.mm(weight, jet_rows.first(d), out=dy[d, :, block])
            for d in range(seconds):
                torch.mm(weight, jet_rows.second(d), out=d2y[d, :, block])
        features.buffer = None
        ctx.save_for_backward(z, first, second, weight, weights)
        ctx.set_materialize_grads(False)
        ctx.features, ctx.plain = features, plain
        return y, dy, d2y

    @staticmethod
    def backward(ctx, grad_y, grad_dy, grad_d2y):  # pyright: ignore[reportIncompatibleMethodOverride] (*grad_outputs)
        z, first, second, weight, weights = ctx.saved_tensors
        grads = grad_y, grad_dy, grad_d2y
        if torch.is_grad_enabled():
            return *plain_gradients(ctx, grads), *[None] * 4
        to_inputs = any(ctx.needs_input_grad[:3])
        inputs = (z, first, z if second is None else second)
        to_z, to_first, to_second = (part.new_zeros(part.shape if to_inputs else 0) for part in inputs)
        transposed = weight.t().contiguous() if to_inputs else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        derivatives = [d for d in range(4) if (d < 3 or to_inputs) and (d > 0 or grad_y is not None)]
        features = copy.copy(ctx.features)  # so that its memory is this call's, whatever other threads do
        scales = features.scales
        for block in features.blocks(z.shape[1]):
            jet_rows = JetRows(features, block, z, first, second, weights, derivatives)

            def sums(jet_row: Tensor, gradient: Tensor, orders: Sequence[int], jet_rows=jet_rows) -> list[Tensor]:
                if to_weight is not None:
                    to_weight.addmm_(gradient, jet_row.t())
                return [] if transposed is None else jet_rows.sums(transposed, gradient, orders)

            if grad_y is not None:
                for by_first in sums(jet_rows.value(), grad_y[:, block], (1,)):
                    to_z[:, block].addcmul_(by_first, scales[1])
            for d, given in enumerate([] if grad_dy is None else grad_dy):
                if found := sums(jet_rows.first(d), given[:, block], (1, 2)):
                    to_first[d, :, block].addcmul_(found[0], scales[1])
                    to_z[:, block].addcmul_(found[1].mul_(scales[2]), first[d, :, block])
            for d, given in enumerate([] if grad_d2y is None else grad_d2y):
                found = sums(jet_rows.second(d), given[:, block], (2, 3) if second is None else (2, 3, 1))
                if not found:
                    continue
                by_second, by_third, *by_first = found
                by_second.mul_(scales[2])
                to_z[:, block].addcmul_(by_third.mul_(scales[3]), jet_rows.square[d])
                if second is not None:
                    to_second[d, :, block].addcmul_(by_first[0], scales[1])
                    to_z[:, block].addcmul_(by_second, second[d, :, block])
                for c in range(len(first)) if weights is not None else (d,):
                    to_first[c, :, block].addcmul_(by_second, jet_rows.weighted[c], value=2)
        if not to_inputs:
            return None, None, None, to_weight, *[None] * 4
        return to_z, to_first, None if second is None else to_second, to_weight, *[None] * 4


def make_features(basis: Basis, z: Tensor) -> LayerFeatures | FunctionFeatures:
    """The functions of a basis, silu included for a uniform grid, for inputs z (I, N)."""
    return LayerFeatures(basis, z) if isinstance(basis, UniformGrid) else FunctionFeatures(basis, z)


class LayerFeatures:
    """The B-splines of a layer with inputs z (I, N), silu, and the derivatives of both, in blocks of rows.

    Positions are counted in the units of `TruncatedPowers`. The d-th derivatives lack the factor `scales[d]`, (I, 1),
    with which the tensors of inputs are multiplied, since they are smaller.
    """

    def __init__(self, grid: UniformGrid, z: Tensor) -> None:
        order = self.order = grid.spline_order
        self.shape = (grid.num_basis + 1, len(z))
        self.powers = TruncatedPowers(order, grid.num_basis, z)
        self.per_unit = self.powers.unit * grid.per_unit.unsqueeze(-1)
        self.shift = -grid.low.unsqueeze(-1) * self.per_unit
        self.scales = {1: self.per_unit * -order}
        for d in (2, 3):
            self.scales[d] = self.per_unit * -max(order - d + 1, 1) * self.scales[d - 1]
        size = JET_BLOCK if z.device.type == "cpu" else OFF_CPU
        self.rows = max(128, size // (self.shape[0] * self.shape[1]))
        self.buffer: Tensor | None = None

    def blocks(self, rows: int) -> list[slice]:
        """Of about the same size, none above `self.rows`."""
        count = max(1, -(-rows // self.rows))
        return blocks(0, rows, max(1, -(-rows // count)))

    def buffers(self, z: Tensor) -> Tensor:
        """Memory for five features and for what `derivatives` needs: (buffers, K + 1, I, rows)."""
        count, numbers = 5 + 2 * len(self.powers.factors), self.shape[0] * z.numel()
        if self.buffer is None:
            self.buffer = z.new_empty(count * numbers)  # the first block is the largest
        return self.buffer[: count * numbers].view(count, *self.shape, z.shape[1])

    def derivatives(self, z: Tensor, orders: Sequence[int]) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """The derivatives of consecutive orders at z (I, rows), each (K + 1, I, rows); and two buffers more."""
        count = len(self.powers.factors)
        buffers = self.buffers(z).unbind(0)
        found = dict(zip(orders, buffers, strict=False))
        sign, *others = (buffer[:-1] for buffer in buffers[4:])
        offsets = torch.addcmul(self.shift, z, self.per_unit)
        torch.sub(offsets, self.powers.centers[:, None, None], out=others[0])
        torch.sign(others[0], out=sign)
        distances, terms = self.powers.distances(others[0].abs_(), others[1:count]), others[count:]

        reached = 0  # the power in `terms`
        for d in sorted(orders, reverse=True):
            power, values = self.order - d, found[d][:-1]
            if power < 0:
                values.zero_()
                continue
            for t, out in zip(distances, terms, strict=True):
                if reached > 1:  # the power before
                    out.mul_(t)
                elif power != 1:
                    integer_power(t, power, out=out)
            reached = power
            self.powers.sum_into(values, distances if power == 1 else terms)
            if d % 2:
                values.mul_(sign)
        residual = silu_derivatives(z, max(orders))
        for d, values in found.items():
            values[-1] = residual[d] / self.scales[d] if d else residual[d]
        return found, buffers[4], buffers[5]


class JetRows:
    """What multiplies the coefficients in a jet, for a block of rows, from the derivatives of these orders; each,
    ((K + 1) I, rows), lasts until the next."""

    def __init__(
        self,
        features: LayerFeatures | FunctionFeatures,
        block: slice,
        z,
        first,
        second,
        weights,
        orders: Sequence[int],
    ) -> None:
        first = first[:, :, block]
        self.found, self.buffer, self.other = features.derivatives(z[:, block], orders)
        self.scaled_first = first * features.scales[1]
        self.scaled_second = None if second is None else second[:, :, block] * features.scales[1]
        self.weighted = first if weights is None else first * weights[:, None, None]
        square = self.weighted * first
        self.square = square if weights is None else square.sum(0, keepdim=True)
        self.scaled_square = self.square * features.scales[2]

    def value(self) -> Tensor:
        """f."""
        return self.found[0].flatten(0, 1)

    def first(self, d: int) -> Tensor:
        """f' z' along direction d."""
        return torch.mul(self.found[1], self.scaled_first[d], out=self.buffer).flatten(0, 1)

    def second(self, d: int) -> Tensor:
        """f'' z'^2 + f' z'' along direction d, or their weighted sum."""
        torch.mul(self.found[2], self.scaled_square[d], out=self.buffer)
        if self.scaled_second is not None:
            self.buffer.addcmul_(self.found[1], self.scaled_second[d])
        return self.buffer.flatten(0, 1)

    def sums(self, transposed: Tensor, gradient: Tensor, orders: Sequence[int]) -> list[Tensor]:
        """Sums (I, rows) over the basis functions of the gradient of a jet row times derivatives of these orders."""
        torch.mm(transposed, gradient, out=self.buffer.flatten(0, 1))
        return [torch.mul(self.buffer, self.found[d], out=self.other).sum(0) for d in orders]


def plain_gradients(ctx, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The gradients as differentiable functions of the inputs and of `grads`."""
    *inputs, _ = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    pairs = [(y, grad) for y, grad in zip(ctx.plain(*inputs), grads, strict=True) if grad is not None]
    if not pairs:
        return [None] * 4
    wanted = [part for part, asked in zip(inputs, needed, strict=True) if asked]
    outputs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if asked else None for asked in needed]
