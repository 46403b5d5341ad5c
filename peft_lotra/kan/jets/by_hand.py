# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a dense KAN layer makes of a jet, as one operation with a hand-written backward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..basis import silu_derivatives, spline_factors


# Numbers in a buffer: inputs x basis functions x rows that are taken at a time. New memory costs more than arithmetic
# (0.5 ms a megabyte, measured); a few buffers of this size are used for all rows, and stay with the allocator.
BUFFER = 2**19
BUFFER_OFF_CPU = 2**26


class LayerJet(torch.autograd.Function):
    """
    z (I, N), z' (D, I, N), z'' (D or 1, I, N) or None, and coefficients (O, (K + 1) I) to y, y' and y'' with O for I.

    Arguments after these: the layer that gives the grid, the weights (D,) of the sum of the second derivatives or
    None for each of them, whether y'' alone is wanted, and a function of the first four arguments that computes the
    same by operations that autograd differentiates, for a backward pass that is to be differentiated itself.

    Only the arguments are kept. Features are evaluated in blocks of rows that fit the cache, and again in backward;
    each of the streams f, f' z' and f'' z'^2 + f' z'' goes through the matrix product by itself, so that one buffer
    serves them all. The gradient G of a stream meets f', f'' and f''' in sums over the basis functions.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, layer, weights, only_second, plain):
        rows, outputs = z.shape[1], len(weight)
        block = _Block(layer, z)
        bends = len(first) if weights is None else 1
        y = dy = None
        if not only_second:
            y, dy = z.new_empty(outputs, rows), z.new_empty(len(first), outputs, rows)
        d2y = z.new_empty(bends, outputs, rows)
        for part in block.parts(rows):
            streams = _Streams(block, part, z, first, second, weights, range(1 if only_second else 0, 3))
            if not only_second:
                torch.mm(weight, streams.value(), out=y[:, part])
                for d in range(len(first)):
                    torch.mm(weight, streams.slope(d), out=dy[d, :, part])
            for d in range(bends):
                torch.mm(weight, streams.bend(d), out=d2y[d, :, part])
        block.slab = None
        ctx.save_for_backward(z, first, second, weight, weights)
        ctx.set_materialize_grads(False)
        ctx.block, ctx.plain = block, plain
        return y, dy, d2y

    @staticmethod
    def backward(ctx, grad_y, grad_dy, grad_d2y):
        z, first, second, weight, weights = ctx.saved_tensors
        grads = grad_y, grad_dy, grad_d2y
        if torch.is_grad_enabled():
            return *plain_gradients(ctx, grads), *[None] * 4
        to_inputs = any(ctx.needs_input_grad[:3])
        to_z = to_first = to_second = None
        if to_inputs:
            to_z, to_first = torch.empty_like(z), first.new_empty(first.shape)
            to_second = None if second is None else torch.empty_like(second)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        transposed = weight.t().contiguous() if to_inputs else None
        derivatives = [d for d in range(4) if (d < 3 or to_inputs) and (d > 0 or grad_y is not None)]
        block = copy.copy(ctx.block)  # so that its memory is this call's, whatever other threads do
        scale = block.scales
        for part in block.parts(z.shape[1]):
            streams = _Streams(block, part, z, first, second, weights, derivatives)

            def sums(stream: Tensor, gradient: Tensor, orders: Sequence[int], streams=streams) -> list[Tensor]:
                if to_weight is not None:
                    to_weight.addmm_(gradient, stream.t())
                return streams.sums(transposed, gradient, orders) if to_inputs else []

            along_z, along_first = None, [None] * len(first)
            if grad_y is not None:
                for slope in sums(streams.value(), grad_y[:, part], (1,)):
                    along_z = slope.mul_(scale[1])
            if grad_dy is not None:
                for d in range(len(first)):
                    found = sums(streams.slope(d), grad_dy[d, :, part], (1, 2))
                    if found:
                        along_first[d] = found[0].mul_(scale[1])
                        bent = found[1].mul_(scale[2]).mul_(first[d, :, part])
                        along_z = bent if along_z is None else along_z.add_(bent)
            for d in range(0 if grad_d2y is None else len(grad_d2y)):
                found = sums(streams.bend(d), grad_d2y[d, :, part], (1, 2, 3) if second is not None else (2, 3))
                if not found:
                    continue
                *slope, bend, jerk = found
                bend.mul_(scale[2])
                jerk.mul_(scale[3]).mul_(streams.square[d])
                along_z = jerk if along_z is None else along_z.add_(jerk)
                if slope:
                    torch.mul(slope[0], scale[1], out=to_second[d, :, part])
                    along_z.addcmul_(bend, second[d, :, part])
                for c in range(len(first)) if weights is not None else (d,):
                    square = bend * streams.weighted[c]
                    along_first[c] = square.mul_(2) if along_first[c] is None else along_first[c].add_(square, alpha=2)
            if to_inputs:
                to_z[:, part] = 0 if along_z is None else along_z
                for d, along in enumerate(along_first):
                    to_first[d, :, part] = 0 if along is None else along
                if to_second is not None and grad_d2y is None:
                    to_second[..., part] = 0
        return to_z, to_first, to_second, to_weight, *[None] * 4


class _Block:
    """
    A layer's features in blocks of rows.

    As in `_Evaluator` of the values alone, positions are counted in units of which the p-th power is p! grid
    intervals, and the d-th derivative of the splines lacks the factor `scales[d]`, (I, 1), which the derivatives of
    the residual function are divided by: it belongs to the tensors of inputs, which are smaller.
    """

    def __init__(self, layer: nn.Module, z: Tensor) -> None:
        order = self.order = layer.spline_order
        self.factors = spline_factors(order)
        self.shape = (layer.grid_size + order + 1, len(z))
        self.unit = math.factorial(order) ** (-1 / order)
        low, high = layer.low.unsqueeze(-1), layer.high.unsqueeze(-1)
        self.per_unit = self.unit * layer.grid_size / (high - low)
        self.shift = -low * self.per_unit
        self.scales = [None]
        for d in range(1, 4):
            self.scales.append(self.per_unit * -max(order - d + 1, 1) * (1 if d == 1 else self.scales[-1]))
        self.centres, self.half_width = _constants(layer.grid_size + order, order, z.dtype, z.device)
        buffer = BUFFER if z.device.type == "cpu" else BUFFER_OFF_CPU
        self.rows = max(128, buffer // (self.shape[0] * self.shape[1]))
        self.slab = None

    def parts(self, rows: int) -> list[slice]:
        """Of about the same size, none above `self.rows`."""
        size = -(-rows // max(1, -(-rows // self.rows)))
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)] if rows else []

    def buffers(self, z: Tensor) -> Tensor:
        """Five features, or their derivatives, and what else `features` needs: (buffers, K + 1, I, rows)."""
        count, numbers = 5 + 2 * len(self.factors), self.shape[0] * z.numel()
        if self.slab is None:
            self.slab = z.new_empty(count * numbers)  # the first part is the largest
        return self.slab[: count * numbers].view(count, *self.shape, z.shape[1])

    def features(self, z: Tensor, derivatives: Sequence[int]) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """The derivatives of these orders at z (I, rows), each (K + 1, I, rows), silu last; and two buffers more."""
        count = len(self.factors)
        buffers = self.buffers(z).unbind(0)
        found = dict(zip(derivatives, buffers, strict=False))
        sign, *others = (buffer[:-1] for buffer in buffers[4:])
        arms, powers = others[:count], others[count:]
        arm = torch.sub(torch.addcmul(self.shift, z, self.per_unit), self.centres, out=arms[0])
        torch.sign(arm, out=sign)
        torch.sub(self.half_width, arm.abs_(), out=arm).relu_()
        for following in arms[1:]:
            arm = torch.sub(arm, self.unit, out=following).relu_()

        reached = None  # the power in `terms`
        for d in sorted(derivatives, reverse=True):
            power, values = self.order - d, found[d][:-1]
            if power < 0:
                values.zero_()
                continue
            if power == 0:  # 0^0 is 0
                terms = [torch.sign(arm, out=out) for arm, out in zip(arms, powers, strict=True)]
            elif power == 1:
                terms = arms
            elif reached is None:
                terms = [torch.pow(arm, power, out=out) for arm, out in zip(arms, powers, strict=True)]
            else:
                for _ in range(power - reached):
                    terms = [torch.mul(t, arm, out=out) for t, arm, out in zip(terms, arms, powers, strict=True)]
            reached, total = power, terms[0]
            for factor, term in zip(self.factors[1:], terms[1:], strict=True):
                total = torch.add(total, term, alpha=factor, out=values)
            if len(terms) == 1:
                values.copy_(total)
            if d % 2:
                values.mul_(sign)
        residual = silu_derivatives(z, max(derivatives))
        for d, values in found.items():
            values[-1] = residual[d] / self.scales[d] if d else residual[d]
        return found, buffers[4], buffers[5]


class _Streams:
    """What multiplies the coefficients, for the rows of a part; each, ((K + 1) I, rows), lasts until the next."""

    def __init__(self, block, part, z, first, second, weights, derivatives) -> None:
        first = first[:, :, part]
        self.found, self.buffer, self.other = block.features(z[:, part], derivatives)
        self.first = first * block.scales[1]
        self.second = None if second is None else second[:, :, part] * block.scales[1]
        self.weighted = first if weights is None else first * weights[:, None, None]
        square = self.weighted * first
        self.square = square if weights is None else square.sum(0, keepdim=True)
        self.scaled_square = self.square * block.scales[2]

    def value(self) -> Tensor:
        return self.found[0].flatten(0, 1)

    def slope(self, d: int) -> Tensor:
        return torch.mul(self.found[1], self.first[d], out=self.buffer).flatten(0, 1)

    def bend(self, d: int) -> Tensor:
        torch.mul(self.found[2], self.scaled_square[d], out=self.buffer)
        if self.second is not None:
            self.buffer.addcmul_(self.found[1], self.second[d])
        return self.buffer.flatten(0, 1)

    def sums(self, transposed: Tensor, gradient: Tensor, orders: Sequence[int]) -> list[Tensor]:
        """Sums (I, rows) over the basis functions of the gradient of a stream times derivatives of these orders."""
        torch.mm(transposed, gradient, out=self.buffer.flatten(0, 1))
        return [torch.mul(self.buffer, self.found[d], out=self.other).sum(0) for d in orders]


@lru_cache(maxsize=64)
def _constants(num_basis: int, order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres (num_basis, 1, 1) of the basis functions and half the width of their support, in units of `_Block`."""
    unit = math.factorial(order) ** (-1 / order)
    with torch.inference_mode(False):
        centres = (torch.arange(num_basis, dtype=dtype, device=device) - (order - 1) / 2) * unit
        return centres[:, None, None], torch.tensor((order + 1) / 2 * unit, dtype=dtype, device=device)


def plain_gradients(ctx, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients as differentiable functions of the inputs and of `grads`."""
    *inputs, _ = ctx.saved_tensors
    pairs = [(y, grad) for y, grad in zip(ctx.plain(*inputs), grads, strict=True) if grad is not None]
    needed = ctx.needs_input_grad[:4]
    if not pairs:
        return [None] * 4
    wanted = [part for part, asked in zip(inputs, needed, strict=True) if asked]
    outputs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if asked else None for asked in needed]
