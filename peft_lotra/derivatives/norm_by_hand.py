# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What layer normalization makes of a jet, as one operation with a hand-written backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_jet import needs_plain_gradients, plain_gradients


class LayerNormJet(torch.autograd.Function):
    """z (I, N), z' (D, I, N), z'' (D or 1, I, N) or None, and the scale (I,) or None to y, y' and y''. The function
    `plain` of these four does the same by operations that autograd differentiates.

    With n, a and b the centered inputs times s = (mean(m^2) + eps)^(-1/2), m being the centered z, and means over I,

        y = n,   y' = a - n c,   y'' = b - 2 a c + n e,   c = mean(n a),   e = 3 c^2 - mean(a^2) - mean(n b).

    All parts are in one tensor, (1 + D + (D or 1), I, N), so that an operation is for all of them.
    """

    @staticmethod
    def forward(ctx, z, first, second, scale, weights, eps, plain):
        count = len(first)
        parts = z.new_empty(1 + count + (count if weights is None else 1), *z.shape)
        parts[0] = z
        parts[1 : 1 + count] = first
        parts[1 + count :] = 0 if second is None else second
        parts -= parts.mean(1, keepdim=True)
        spare = parts * parts[0]
        means = spare.mean(1)  # of the products with m
        s = torch.rsqrt(means[0] + eps)
        parts *= s
        means *= s * s
        n, a, b = parts[0], parts[1 : 1 + count], parts[1 + count :]
        c, with_b = means[1:].split([count, len(b)])
        e = _sum_of_directions(3 * c.square() - torch.mul(a, a, out=spare[:count]).mean(1), weights) - with_b
        results = torch.empty_like(parts)
        results[0] = n
        torch.addcmul(a, n, c.unsqueeze(1), value=-1, out=results[1 : 1 + count])
        torch.addcmul(b, n, e.unsqueeze(1), out=results[1 + count :])
        _subtract_products(results[1 + count :], a, c, weights)
        ctx.save_for_backward(z, first, second, scale, weights, parts, s, c, e, None if scale is None else results)
        ctx.plain = plain
        if scale is not None:
            results = results * scale.unsqueeze(-1)
        return results[0], results[1 : 1 + count], results[1 + count :]

    @staticmethod
    def backward(ctx, *gradients):
        if needs_plain_gradients(*gradients):
            return *plain_gradients(ctx, gradients), *[None] * 3
        _, first, second, scale, weights, parts, s, c, e, results = ctx.saved_tensors
        count, size = len(first), parts.shape[1]
        g = torch.cat([gradients[0].unsqueeze(0), *gradients[1:]])
        to_scale = (g * results).sum((0, 2)) if ctx.needs_input_grad[3] else None
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, to_scale, None, None, None
        if scale is not None:
            g *= scale.unsqueeze(-1)
        n, a, b = parts[0], parts[1 : 1 + count], parts[1 + count :]
        gn, ga, gb = g[0], g[1 : 1 + count], g[1 + count :]
        towards_c, towards_e = (g[1:] * n).sum(1).split([count, len(gb)])
        towards_c = _share((gb * a).sum(1), weights) * -2 - towards_c
        towards_c += 6 * c * _share(towards_e, weights)
        for part, factor in (*zip(ga, -c, strict=True), *zip(gb, e, strict=True)):
            gn.addcmul_(part, factor)
        for part, factor in (*zip(a, towards_c, strict=True), *zip(b, -towards_e, strict=True)):
            gn.addcmul_(part, factor, value=1 / size)
        ga.addcmul_(gb, _share(c, weights).unsqueeze(1), value=-2)
        ga.addcmul_(a, _share(towards_e, weights).expand_as(c).unsqueeze(1), value=-2 / size)
        ga.addcmul_(n, towards_c.unsqueeze(1), value=1 / size)
        gb.addcmul_(n, towards_e.unsqueeze(1), value=-1 / size)
        gn.addcmul_(n, (g * parts).sum((0, 1)), value=-1 / size)
        g -= g.mean(1, keepdim=True)
        g *= s
        return gn, ga, None if second is None else gb, to_scale, None, None, None


def _sum_of_directions(x: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum of (D, N), (1, N); without weights each by itself."""
    return x if weights is None else (weights @ x).unsqueeze(0)


def _share(x: Tensor, weights: Tensor | None) -> Tensor:
    """What `_sum_of_directions` makes of gradients (1, N), or products of these (D, N): (D, N)."""
    return x if weights is None else x * weights.unsqueeze(-1)


def _subtract_products(seconds: Tensor, a: Tensor, c: Tensor, weights: Tensor | None) -> None:
    """Subtracts 2 a c from (D, I, N), or the weighted sum of it from (1, I, N)."""
    for index, (one, factor) in enumerate(zip(a, _share(c, weights), strict=True)):
        seconds[index if weights is None else 0].addcmul_(one, factor, value=-2)
