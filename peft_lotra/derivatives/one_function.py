# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A jet through a layer with one function of each input, as are the residual branches of other libraries' layers."""

from __future__ import annotations

import torch

from .bases import tensors_of
from .layer_jet import needs_plain_gradients, plain_gradients, weighted_square


class OneFunctionJet(torch.autograd.Function):
    """As `LayerJet`, with the same arguments, for a basis of one function and coefficients (O, I).

    The factors of the coefficients, (I, S, N) with S = 1 + D + (D or 1), are one matrix, so that each product is one.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, basis, weights, only_second, plain):
        count = len(first)
        to_inputs = any(ctx.needs_input_grad[:3])
        with torch.no_grad():
            found = [part[0] for part in basis.evaluate(z, 3 if to_inputs else 2)]
        weighted, square = weighted_square(first, weights)
        start = 0 if only_second else 1 + count
        rows = z.new_empty(len(z), start + len(square), z.shape[1])
        by_part = rows.transpose(0, 1)
        if not only_second:
            by_part[0] = found[0]
            torch.mul(found[1], first, out=by_part[1:start])
        torch.mul(found[2], square, out=by_part[start:])
        if second is not None:
            by_part[start:].addcmul_(found[1], second)
        y = (weight @ rows.flatten(1)).view(len(weight), -1, z.shape[1]).transpose(0, 1)
        ctx.save_for_backward(z, first, second, weight, rows, weighted, square, *found[1:], *tensors_of(basis))
        ctx.set_materialize_grads(False)
        ctx.plain, ctx.start = plain, start
        return (None, None, y) if only_second else (y[0], y[1:start], y[start:])

    @staticmethod
    def backward(ctx, *gradients):
        z, first, second, weight, rows, weighted, square, *found = ctx.saved_tensors
        if needs_plain_gradients(*gradients):
            return *plain_gradients(ctx, gradients), *[None] * 4
        start = ctx.start
        counts = (min(start, 1), max(start - 1, 0), rows.shape[1] - start)
        g = torch.cat(
            [
                z.new_zeros(len(weight), count, z.shape[1])
                if part is None
                else part.reshape(count, *part.shape[-2:]).transpose(0, 1)
                for count, part in zip(counts, gradients, strict=True)
            ],
            dim=1,
        )
        to_weight = g.flatten(1) @ rows.flatten(1).T if ctx.needs_input_grad[3] else None
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, to_weight, *[None] * 4
        towards = (weight.T @ g.flatten(1)).view_as(rows).transpose(0, 1)
        slope, bend, jerk, *_ = found
        of_second = towards[start:]
        to_second = None if second is None else slope * of_second
        bent = bend * of_second
        to_first = 2 * bent * weighted
        to_z = (of_second * square).sum(0) * jerk
        if second is not None:
            to_z += (bent * second).sum(0)
        if start:
            of_first = towards[1:start]
            to_first.addcmul_(slope, of_first)
            to_z.addcmul_(slope, towards[0]).addcmul_(bend, (of_first * first).sum(0))
        return to_z, to_first, to_second, to_weight, *[None] * 4
