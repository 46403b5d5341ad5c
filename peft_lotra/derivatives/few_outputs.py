# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A jet through a dense KAN layer with few outputs, by the functions on its edges."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kan.basis import UniformGrid
from ..kan.memory import JET_BLOCK
from ..kan.product import needs_plain_operations
from .bases import Basis, tensors_of
from .edges import FunctionEdges, SplineEdges
from .layer_jet import needs_plain_gradients, plain_gradients, weighted_square


# Above so many outputs, the matrix product of `LayerJet` costs less. `examples/studies/pde/jet_speed.py`, with more
# outputs.
MOST_OUTPUTS = 2


def few_outputs(basis: Basis, outputs: int, z: Tensor) -> bool:
    """Whether to take `FewOutputsJet`: not for splines below order 3, whose second derivatives jump at the knots, nor
    where other functions, which it evaluates at once, need much memory."""
    if outputs > MOST_OUTPUTS or needs_plain_operations(z):
        return False
    return basis.spline_order >= 3 if isinstance(basis, UniformGrid) else basis.size * z.numel() <= JET_BLOCK


class FewOutputsJet(torch.autograd.Function):
    """As `LayerJet`, with the same arguments.

    The edges phi[o, i] and three derivatives of them are evaluated, (O, I, N), and sums over them are the jet.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, basis, weights, only_second, plain):
        is_grid = isinstance(basis, UniformGrid)
        ctx.edges = SplineEdges(basis.spline_order, basis.num_basis) if is_grid else FunctionEdges(basis.size)
        (phi, *derivatives), kept = ctx.edges.evaluate(basis, z, weight)
        first_phi, second_phi, _ = derivatives
        weighted, square = weighted_square(first, weights)
        d2y = _sum_of_inputs(second_phi, square)
        if second is not None:
            d2y += _sum_of_inputs(first_phi, second)
        y, dy = (None, None) if only_second else (phi.sum(1), _sum_of_inputs(first_phi, first))
        ctx.save_for_backward(z, first, second, weight, *derivatives, weighted, square, *kept, *tensors_of(basis))
        ctx.set_materialize_grads(False)
        ctx.plain, ctx.kept = plain, len(kept)
        return y, dy, d2y

    @staticmethod
    def backward(ctx, grad_y, grad_dy, grad_d2y):  # pyright: ignore[reportIncompatibleMethodOverride] (*grad_outputs)
        z, first, second, weight, *kept = ctx.saved_tensors
        if needs_plain_gradients(grad_y, grad_dy, grad_d2y):
            return *plain_gradients(ctx, (grad_y, grad_dy, grad_d2y)), *[None] * 4
        first_phi, second_phi, third_phi, weighted, square, *kept = kept
        # the gradients towards phi and its derivatives, (O, I, N)
        none = torch.zeros_like(first_phi)
        towards = [none if grad_y is None else grad_y.unsqueeze(1).expand_as(first_phi), none, none]
        if grad_dy is not None:
            towards[1] = _from_outputs(grad_dy, first)
        if grad_d2y is not None:
            if second is not None:
                towards[1] = towards[1] + _from_outputs(grad_d2y, second)
            towards[2] = _from_outputs(grad_d2y, square)
        to_z = to_first = to_second = to_weight = None
        if any(ctx.needs_input_grad[:3]):
            to_z = (towards[0] * first_phi).addcmul_(towards[1], second_phi).addcmul_(towards[2], third_phi).sum(0)
            to_first = torch.zeros_like(first, memory_format=torch.contiguous_format)
            if grad_dy is not None:
                to_first += _to_inputs(grad_dy, first_phi)
            if grad_d2y is not None:
                to_first.addcmul_(_to_inputs(grad_d2y, second_phi), weighted, value=2)
            if second is not None and grad_d2y is not None:
                to_second = _to_inputs(grad_d2y, first_phi)
        if ctx.needs_input_grad[3]:
            to_weight = ctx.edges.gradient(kept[: ctx.kept], towards)
        return to_z, to_first, to_second, to_weight, *[None] * 4


# Sums of products, for few outputs and directions. `torch.einsum` would multiply a small matrix for each row.


def _sum_of_inputs(phi: Tensor, z: Tensor) -> Tensor:
    """(O, I, N) and (D, I, N) to (D, O, N)."""
    return (phi * z.unsqueeze(1)).sum(2)


def _from_outputs(y: Tensor, z: Tensor) -> Tensor:
    """(D, O, N) and (D, I, N) to (O, I, N)."""
    return (y.unsqueeze(2) * z.unsqueeze(1)).sum(0)


def _to_inputs(y: Tensor, phi: Tensor) -> Tensor:
    """(D, O, N) and (O, I, N) to (D, I, N)."""
    return (y.unsqueeze(2) * phi).sum(1)
