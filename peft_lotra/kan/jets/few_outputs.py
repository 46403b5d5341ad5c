# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A jet through a dense KAN layer with few outputs, whose edges are evaluated as piecewise polynomials."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..basis import UniformGrid, silu_derivatives
from ..product import needs_plain_operations
from .by_hand import plain_gradients, weighted_square
from .functions import Basis
from .splines import spline_pieces


# Above so many outputs, the matrix product of `LayerJet` costs less. `examples/studies/pde/jet_speed.py`, with more
# outputs.
MOST_OUTPUTS = 2


def few_outputs(basis: Basis, outputs: int, z: Tensor) -> bool:
    """Whether to take `FewOutputsJet`: not below order 3, where second derivatives jump at the knots."""
    is_smooth = isinstance(basis, UniformGrid) and basis.spline_order >= 3
    return is_smooth and outputs <= MOST_OUTPUTS and not needs_plain_operations(z)


class FewOutputsJet(torch.autograd.Function):
    """As `LayerJet`, with the same arguments.

    An edge phi[o, i] is a polynomial in each grid interval, whose coefficients are gathered for each point: phi and
    three derivatives, (O, I, N), cost a few operations, and nothing has the size of the basis. The backward pass forms
    the gradient of the coefficients from sums of moments by interval.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, grid, weights, only_second, plain):
        order, inputs = grid.spline_order, len(z)
        scale = grid.per_unit.unsqueeze(-1)
        position = ((z - grid.low.unsqueeze(-1)) * scale).clamp_(
            -order - 1, grid.grid_size + order + 1
        )  # constant zero beyond
        start = position.floor()
        t = position.sub_(start)
        intervals = grid.grid_size + 2 * order + 3
        index = start.nan_to_num_().long().add_(order + 1)
        index += torch.arange(inputs, device=z.device).unsqueeze(-1) * intervals
        index = index.flatten()

        splines, base = weight.view(len(weight), -1, inputs).transpose(1, 2).split([grid.grid_size + order, 1], -1)
        windows = nn.functional.pad(splines, (order + 1, order + 2)).unfold(-1, order + 1, 1)
        pieces = spline_pieces(order, z.dtype, z.device)[0]
        table = torch.einsum("oijl,lq->qoij", windows, pieces).reshape(-1, inputs * intervals)
        gathered = table.index_select(1, index).view(order + 1, -1, *z.shape)

        residual = silu_derivatives(z, 3)
        phi = []  # and its derivatives
        for d in range(1 if only_second else 0, 4):
            value = gathered[order] * math.perm(order, d)
            for power in range(order - 1, d - 1, -1):
                value = torch.addcmul(gathered[power] * math.perm(power, d), value, t)
            phi.append((value.mul_(scale**d) if d else value).addcmul_(base, residual[d]))
        weighted, square = weighted_square(first, weights)

        *value, first_phi, second_phi, third_phi = phi
        d2y = _over_inputs(second_phi, square)
        if second is not None:
            d2y += _over_inputs(first_phi, second)
        y, dy = (None, None) if only_second else (value[0].sum(1), _over_inputs(first_phi, first))
        kept = scale, t, index, first_phi, second_phi, third_phi, weighted, square
        ctx.save_for_backward(z, first, second, weight, *kept, *residual)
        ctx.set_materialize_grads(False)
        ctx.plain, ctx.sizes = plain, (order, grid.grid_size + order, intervals)
        return y, dy, d2y

    @staticmethod
    def backward(ctx, grad_y, grad_dy, grad_d2y):  # pyright: ignore[reportIncompatibleMethodOverride] (*grad_outputs)
        z, first, second, weight, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *plain_gradients(ctx, (grad_y, grad_dy, grad_d2y)), *[None] * 4
        scale, t, index, first_phi, second_phi, third_phi, weighted, square, *residual = kept
        # the gradients towards phi and its derivatives, (O, I, N)
        none = torch.zeros_like(first_phi)
        towards = [none if grad_y is None else grad_y.unsqueeze(1).expand_as(first_phi), none, none]
        if grad_dy is not None:
            towards[1] = _over_directions(grad_dy, first)
        if grad_d2y is not None:
            if second is not None:
                towards[1] = towards[1] + _over_directions(grad_d2y, second)
            towards[2] = _over_directions(grad_d2y, square)
        to_z = to_first = to_second = to_weight = None
        if any(ctx.needs_input_grad[:3]):
            to_z = (towards[0] * first_phi).addcmul_(towards[1], second_phi).addcmul_(towards[2], third_phi).sum(0)
            to_first = torch.zeros_like(first, memory_format=torch.contiguous_format)
            if grad_dy is not None:
                to_first += _over_outputs(grad_dy, first_phi)
            if grad_d2y is not None:
                to_first += _over_outputs(grad_d2y, second_phi) * weighted * 2
            if second is not None and grad_d2y is not None:
                to_second = _over_outputs(grad_d2y, first_phi)
        if ctx.needs_input_grad[3]:
            terms = [(g * r).sum(-1) for g, r in zip(towards, residual[:3], strict=True)]
            to_base = terms[0] + terms[1] + terms[2]
            to_weight = _weight_gradient(ctx.sizes, t, index, [g * scale**d for d, g in enumerate(towards)])
            to_weight = torch.cat([to_weight, to_base.unsqueeze(-1)], dim=-1).transpose(1, 2).flatten(1)
        return to_z, to_first, to_second, to_weight, *[None] * 4


# Sums of products, for few outputs and directions. `torch.einsum` would multiply a small matrix for each row.


def _over_inputs(phi: Tensor, z: Tensor) -> Tensor:
    """(O, I, N) and (D, I, N) to (D, O, N)."""
    return (phi * z.unsqueeze(1)).sum(2)


def _over_directions(y: Tensor, z: Tensor) -> Tensor:
    """(D, O, N) and (D, I, N) to (O, I, N)."""
    return (y.unsqueeze(2) * z.unsqueeze(1)).sum(0)


def _over_outputs(y: Tensor, phi: Tensor) -> Tensor:
    """(D, O, N) and (O, I, N) to (D, I, N)."""
    return (y.unsqueeze(2) * phi).sum(1)


def _weight_gradient(sizes: tuple[int, ...], t: Tensor, index: Tensor, towards: list[Tensor]) -> Tensor:
    """(O, I, K), from the gradients towards the splines and their first two derivatives in grid units, (O, I, N)."""
    order, num_basis, intervals = sizes
    powers = [torch.ones_like(t), t]
    for _ in range(order - 1):
        powers.append(powers[-1] * t)
    moments = t.new_empty(order + 1, *towards[0].shape)
    for q, moment in enumerate(moments):
        torch.mul(towards[0], powers[q], out=moment)
        for d in range(1, min(q, 2) + 1):
            moment.addcmul_(towards[d], powers[q - d], value=math.perm(q, d))
    outputs, inputs = towards[0].shape[:2]
    sums = t.new_zeros((order + 1) * outputs, inputs * intervals)
    sums = sums.index_add_(1, index, moments.view(len(sums), -1)).view(order + 1, outputs, inputs, intervals)
    windows = torch.einsum("qoij,lq->loij", sums, spline_pieces(order, t.dtype, t.device)[0])
    # entry l of the window of interval j, counted from -order - 1, is basis function j + l
    shifted = [window[..., order + 1 - m :][..., :num_basis] for m, window in enumerate(windows)]
    return sum(shifted[1:], shifted[0])
