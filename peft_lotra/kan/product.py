# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The product of a B-spline basis with coefficients, y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), as one operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..modules.calls import is_tracing
from .basis import UniformGrid, evaluate_splines, in_transform, is_batched, spline_offsets
from .memory import EVALUATED, MULTIPLIED_ROWS, OFF_CPU, blocks


# Up to so many values of basis functions, plain operations cost less than blocks.
_PLAIN_UP_TO = 2**17


def spline_product(x: Tensor, grid: UniformGrid, *weights: Tensor) -> Tensor:
    r"""Compute y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), with the basis functions B_k of `bspline_basis`.

    Many basis functions are evaluated in blocks that fit the cache, and again in the backward pass: nothing of the
    size (N, I, K) is kept.

    Args:
        x: Points (N, I).
        grid: The grid of each input.
        weights: Tensors (O, I, K), which together are W. Those that are frozen cost no gradient.

    Returns:
        (N, O), where O counts the outputs of all weights.
    """
    is_small = not is_tracing() and x.numel() * grid.num_basis <= _PLAIN_UP_TO
    ends_vary = grid.low.requires_grad or grid.high.requires_grad
    if is_small or ends_vary or needs_plain_operations(x, grid.low, grid.high, *weights):
        functions = grid.functions(x)
        return plain_product(functions, *weights)
    return _SplineProduct.apply(x, *grid, *weights)


def plain_product(functions: Tensor, *weights: Tensor) -> Tensor:
    """Compute the product (N, O) of functions (N, I, K) with weights (O, I, K), see `spline_product`."""
    matrix = functions.flatten(1)
    products = [F.linear(matrix, weight.flatten(1)) for weight in weights]
    return concatenate(products, 1)


def concatenate(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return `torch.cat(tensors, dim)`, which would copy a single tensor."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tuple(tensors), dim)


def sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of the products of one or more pairs."""
    (left, right), *pairs = pairs
    total = left * right
    for left, right in pairs:
        total = torch.addcmul(total, left, right)
    return total


def needs_plain_operations(x: Tensor, *tensors: Tensor | None) -> bool:
    """Return whether operations that write into memory must give way to those that all of torch knows."""
    if is_tracing() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)
        return True
    if x.is_meta or x.dtype not in (torch.float32, torch.float64):
        return True
    if torch.is_autocast_enabled(x.device.type) or in_transform():
        return True
    for tensor in (x, *tensors):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype != x.dtype:
            return True
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    return False


class _SplineProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        low,
        high,
        grid_size,
        spline_order,
        *weights,
    ):
        ctx.sizes = grid_size, spline_order
        ctx.save_for_backward(x, low, high, *weights)
        grid = UniformGrid(low, high, grid_size, spline_order)
        weight = concatenate(weights, 0)
        matrix = weight.mT.flatten(1)  # (O, K I)
        result = x.new_empty(len(x), len(matrix))
        position = grid.positions(x)
        for rows in blocks(len(x), block_size(x, grid)):
            offsets = spline_offsets(position[rows], grid)
            (functions,) = evaluate_splines(offsets, spline_order, [0], overwrites=True)
            torch.mm(functions.flatten(1), matrix.t(), out=result[rows])
        return result.div_(math.factorial(spline_order))

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        x, low, high, *weights = ctx.saved_tensors
        grid = UniformGrid(low, high, *ctx.sizes)
        needs_x, _, _, _, _, *needs_weights = ctx.needs_input_grad
        if is_plain_backward(gradient):

            def product(x: Tensor, *weights: Tensor) -> list[Tensor]:
                return [plain_product(grid.functions(x), *weights)]

            needed = [needs_x, *needs_weights]
            grad_x, *grad_weights = plain_gradients(product, [x, *weights], needed, [gradient])
            return grad_x, *[None] * 4, *grad_weights

        weight = concatenate(weights, 0) if needs_x else None
        columns = gradient.split([len(weight) for weight in weights], 1)
        of_trained = [column for column, is_trained in zip(columns, needs_weights, strict=True) if is_trained]
        grad_outputs = torch.cat(of_trained, 1) if of_trained else None
        grad_x, grad_trained = _gradients(x, grid, weight, gradient, grad_outputs)

        grad_weights: list[Any] = [None] * len(weights)
        start = 0
        for number, is_trained in enumerate(needs_weights):
            if is_trained and grad_trained is not None:
                stop = start + len(weights[number])
                grad_weights[number] = grad_trained[start:stop]
                start = stop
        return grad_x, *[None] * 4, *grad_weights


def _gradients(
    x: Tensor,
    grid: UniformGrid,
    weight: Tensor | None,
    gradient: Tensor,
    of_trained: Tensor | None,
) -> tuple[Any, Any]:
    """Return the gradients of the points and of the trained weights, from the gradients of the outputs."""
    position = grid.positions(x)
    matrix: Any = None
    grad_x = grad_matrix = None
    derivatives = []
    if weight is not None:
        matrix = weight.mT.flatten(1)  # (O, K I)
        grad_x = torch.empty_like(position)
        derivatives.append(1)
    if of_trained is not None:
        grad_matrix = x.new_zeros(of_trained.shape[1], grid.num_basis * x.shape[1])
        derivatives.append(0)
    for rows in blocks(len(x), block_size(x, grid)):
        offsets = spline_offsets(position[rows], grid)
        functions = evaluate_splines(offsets, grid.spline_order, derivatives, overwrites=True)
        if grad_x is not None:
            slopes = functions[0]
            grad_functions = torch.mm(gradient[rows], matrix).view_as(offsets)
            grad_functions.mul_(slopes)
            torch.sum(grad_functions, 1, out=grad_x[rows])
        if grad_matrix is not None and of_trained is not None:
            values = functions[-1].flatten(1)
            grad_matrix.addmm_(of_trained[rows].t(), values)

    # the factors that `evaluate_splines` leaves out
    if grad_x is not None:
        grad_x.mul_(grid.per_unit / -math.factorial(grid.spline_order - 1))
    if grad_matrix is not None:
        grad_matrix.div_(math.factorial(grid.spline_order))
        grad_matrix = grad_matrix.unflatten(1, (grid.num_basis, -1)).mT
    return grad_x, grad_matrix


def block_size(x: Tensor, grid: UniformGrid) -> int:
    """Return how many of the points (N, I) are evaluated at a time."""
    size = EVALUATED if x.device.type == "cpu" else OFF_CPU
    values_per_point = x.shape[1] * grid.num_basis
    return max(MULTIPLIED_ROWS, size // values_per_point)


def is_plain_backward(*gradients: Tensor | None) -> bool:
    """Return whether a backward pass is differentiated again, or is one of `is_grads_batched`."""
    if torch.is_grad_enabled():
        return True
    return any(gradient is not None and is_batched(gradient) for gradient in gradients)


def plain_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients in the inputs, as differentiable functions of these and of the gradients in the outputs."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # as views, since one may depend on another
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        results = function(*inputs)

    outputs = []
    grad_outputs = []
    for output, grad in zip(results, grads, strict=True):
        if grad is not None:
            outputs.append(output)
            grad_outputs.append(grad)
    if not outputs:
        return [None] * len(inputs)

    leaves: Any = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    gradients = torch.autograd.grad(outputs, leaves, grad_outputs, create_graph=differentiable, allow_unused=True)
    remaining = iter(gradients)
    return [next(remaining) if is_needed else None for is_needed in needed]
