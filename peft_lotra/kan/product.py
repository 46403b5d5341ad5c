# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The product of a B-spline basis with coefficients, y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), as one operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..modules.calls import is_tracing
from .basis import UniformGrid, bspline_basis, in_transform, integer_power, is_batched, spline_factors
from .memory import EVALUATED, MULTIPLIED_ROWS, OFF_CPU, blocks, workspace
from .sparse_product import Gradients, Pair, is_sparse, sparse_gradients, sparse_product


# From so many points for each output the sum of weight and update costs less than a product with both; whether there
# is an update in factors at all is decided by the shapes alone, in `kan.formula`. From so many points, too, and so
# many inputs, rows ordered (K, I) save more in the evaluation than the coefficients in that order cost. Series `width`
# and `batch` of `examples/studies/benchmarks/run.py --only growth`.
_SUM_FROM = 4
_FUNCTIONS_FIRST_FROM = 16


def spline_product(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    grid_size: int,
    spline_order: int,
    weight: Tensor,
    update: Pair | None = None,
) -> Tensor:
    r"""Compute y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), with the basis functions B_k of `bspline_basis`.

    W is the weight (O, I, K) or, with an update of left (O, r) and right (r, I, K),
    weight + sum_r left[o, r] right[r, i, k].

    The basis is evaluated in blocks that fit the cache, and again in the backward pass: nothing of the size (N, I, K)
    is kept. On large grids, only the coefficients of the p + 1 functions that are not zero at a point are gathered.
    Plain operations form the basis at once, as does a backward pass that is itself differentiated.
    """
    left, right = update or (None, None)
    ends_vary = low.requires_grad or high.requires_grad
    if ends_vary or needs_plain_operations(x, low, high, weight, left, right):
        return plain_product(bspline_basis(x, low, high, grid_size, spline_order), weight, left, right)
    return _SplineProduct.apply(x, low, high, grid_size, spline_order, weight, left, right)


def plain_product(basis: Tensor, weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    basis = basis.flatten(1)
    y = F.linear(basis, weight.flatten(1))
    if left is None or right is None:
        return y
    return torch.addmm(y, F.linear(basis, right.flatten(1)), left.t())


def needs_plain_operations(x: Tensor, *others: Tensor | None) -> bool:
    """Whether operations that write into memory must give way to those that all of torch knows."""
    if (
        is_tracing()  # which fuses them itself
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)
        or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or in_transform()
        or x.dtype not in (torch.float32, torch.float64)
    ):
        return True
    for tensor in (x, *others):
        if tensor is not None and (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or tensor.dtype != x.dtype
            or forward_ad.unpack_dual(tensor).tangent is not None
        ):
            return True
    return False


class _SplineProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high, grid_size, spline_order, weight, left, right):
        ctx.grid = grid_size, spline_order
        ctx.save_for_backward(x, low, high, weight, left, right)
        grid = UniformGrid(low, high, grid_size, spline_order)
        update = None if left is None else (left, right)
        if is_sparse(x, grid):
            return sparse_product(x, grid, weight, update)
        return _Dense(x, grid, weight, update).product()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        x, low, high, *tensors = ctx.saved_tensors
        weight, left, right = tensors
        grid = UniformGrid(low, high, *ctx.grid)
        update = None if left is None else (left, right)
        needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        if is_plain_backward(gradient):
            plain = lambda x, *others: [plain_product(_Basis.apply(x, grid, 0), *others)]  # noqa: E731
            results = plain_gradients(plain, (x, *tensors), needed, [gradient])
        elif is_sparse(x, grid):
            results = sparse_gradients(x, grid, weight, update, gradient, needed)
        else:
            results = _Dense(x, grid, weight, update).gradients(gradient, needed)
        return results[0], *[None] * 4, *results[1:]


class _Basis(torch.autograd.Function):
    """A derivative of the basis functions (N, I, K) at x (N, I), whose backward pass evaluates the next derivative."""

    @staticmethod
    def forward(ctx, x, grid, derivative):
        ctx.save_for_backward(x)
        ctx.grid, ctx.derivative = grid, derivative
        return bspline_basis(x, *grid, derivative=derivative)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        (x,) = ctx.saved_tensors
        return (gradient * _Basis.apply(x, ctx.grid, ctx.derivative + 1)).sum(-1), None, None


def is_plain_backward(*grads: Tensor | None) -> bool:
    """True for a backward pass that is differentiated again, or is one of `is_grads_batched`."""
    return torch.is_grad_enabled() or any(grad is not None and is_batched(grad) for grad in grads)


def plain_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients in the inputs, as differentiable functions of these and of the gradients in the outputs."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]  # one may depend on another
        pairs = [(y, grad) for y, grad in zip(function(*inputs), grads, strict=True) if grad is not None]
        if not pairs:
            return [None] * len(inputs)
        outputs, grad_outputs = zip(*pairs, strict=True)
        leaves: Any = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
        gradients = torch.autograd.grad(outputs, leaves, grad_outputs, create_graph=differentiable, allow_unused=True)
    following = iter(gradients)
    return [next(following) if is_needed else None for is_needed in needed]


@lru_cache(maxsize=64)
def _power_constants(
    spline_order: int, num_basis: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, Tensor, Tensor]:
    """The length of a grid interval with unit^p = 1 / p!, half the width of a support, and the centers (K,)."""
    unit = math.factorial(spline_order) ** (-1 / spline_order)
    with torch.inference_mode(False):  # see `workspace`
        centers = (torch.arange(num_basis, dtype=dtype, device=device) - (spline_order - 1) / 2) * unit
        return unit, torch.tensor((spline_order + 1) / 2 * unit, dtype=dtype, device=device), centers


def block_sizes(x: Tensor, grid: UniformGrid) -> list[int]:
    """Return how many of the points (N, I) are evaluated at a time, and how many enter a matrix product."""
    numbers = EVALUATED if x.device.type == "cpu" else OFF_CPU
    evaluated = numbers // (x.shape[1] * grid.num_basis)
    return [max(1, min(rows, len(x))) for rows in (evaluated, max(evaluated, MULTIPLIED_ROWS))]


class Evaluator:
    """Evaluates all basis functions at points (R, I), up to `rows` points at a time in the same memory.

    The truncated powers of `bspline_basis` are those of t_m = max(half_width - |offset| - m unit, 0), in a unit of
    length in which no pass divides by p!. With `functions_first` a row is ordered (K, I) instead of (I, K), so that
    operations between a number for each input and all basis functions run along the inputs.
    """

    def __init__(self, x: Tensor, grid: UniformGrid, rows: int, functions_first: bool) -> None:
        self.grid, self.rows, self.functions_first = grid, rows, functions_first
        self.factors = spline_factors(grid.spline_order)
        inputs, num_basis = x.shape[1], grid.num_basis
        constants = _power_constants(grid.spline_order, num_basis, x.dtype, x.device)
        self.unit, self.half_width, centers = constants
        self.scale = grid.per_unit * self.unit
        self.centers = centers.unsqueeze(1) if functions_first else centers.repeat(inputs)
        self.split = (num_basis, inputs) if functions_first else (inputs, num_basis)
        self.width = inputs * num_basis
        self.scratch = workspace("scratch", x, 1 + 2 * len(self.factors), rows, self.width)

    def evaluate(self, *tensors: Tensor) -> None:
        """Write the basis functions at points, and gradients of the points.

        Args:
            tensors: The points (R, I) and where to write the functions (R, I K); perhaps followed by the gradient
                (R, I K) of the functions, and where to write the gradient (R, I) of the points.
        """
        for rows in blocks(0, len(tensors[0]), self.rows):
            self._evaluate(*[tensor[rows] for tensor in tensors])

    def _evaluate(self, x: Tensor, out: Tensor, gradient: Tensor | None = None, grad_x: Tensor | None = None) -> None:
        order, count = self.grid.spline_order, len(self.factors)
        buffers = self.scratch[:, : len(x)].unbind()
        offsets = buffers[0]
        self._write_offsets(x, offsets)
        # the slopes need the offsets afterwards
        distances = buffers[:count] if gradient is None else buffers[1 : 1 + count]
        torch.abs(offsets, out=distances[0])
        torch.sub(self.half_width, distances[0], out=distances[0]).relu_()
        for distance, following in zip(distances, distances[1:], strict=False):
            torch.sub(distance, self.unit, out=following).relu_()
        if gradient is None or grad_x is None:
            self._write_sum(out, [integer_power(t, order, out=t) for t in distances])
            return

        pairs = zip(distances, buffers[1 + count :], strict=True)
        powers = [integer_power(t, order - 1, out=buffer) for t, buffer in pairs]
        self._write_sum(out, [t.mul_(power) for t, power in zip(distances, powers, strict=True)])
        # M_p rises up to its center, and falls from there.
        slopes = self._write_sum(powers[0], powers).copysign_(offsets).mul_(gradient)
        torch.sum(slopes.view(-1, *self.split), dim=1 if self.functions_first else 2, out=grad_x)
        grad_x.mul_(self.scale * -order)

    def _write_offsets(self, x: Tensor, out: Tensor) -> None:
        """Write the offsets of the points from the centers."""
        position = (x - self.grid.low) * self.scale
        if self.functions_first:
            torch.sub(position.unsqueeze(1), self.centers, out=out.view(-1, *self.split))
        else:
            out.view(-1, *self.split).copy_(position.unsqueeze(-1))
            out.sub_(self.centers)  # a row: subtracting while broadcasting both is slower

    def _write_sum(self, out: Tensor, powers: Sequence[Tensor]) -> Tensor:
        """Write the weighted sum of the powers; `out` may be the first of them."""
        total = powers[0]
        for factor, power in zip(self.factors[1:], powers[1:], strict=True):
            total = torch.add(total, power, alpha=factor, out=out)
        return total if total is out else out.copy_(total)


class _Dense(Evaluator):
    """The product, by blocks of rows of the whole basis. Many rows are ordered (K, I)."""

    def __init__(self, x: Tensor, grid: UniformGrid, weight: Tensor, update: Pair | None) -> None:
        evaluated, self.multiplied = block_sizes(x, grid)
        many = len(x) >= _SUM_FROM * len(weight)
        super().__init__(x, grid, evaluated, many and x.shape[1] >= _FUNCTIONS_FIRST_FROM)
        self.x = x
        self.modes = (0, 2, 1) if self.functions_first else (0, 1, 2)  # of coefficients, as the rows are ordered
        self.matrix = weight.permute(self.modes).flatten(1)  # (O, I K): the weight, or its sum with the update
        self.is_separate = update is not None and not many
        self.left: Any = None
        if update is not None:
            self.left, self.right = update[0], update[1].permute(self.modes).flatten(1)
            if many:
                self.matrix = torch.addmm(self.matrix, self.left, self.right)

    def product(self) -> Tensor:
        """Compute the product (N, O)."""
        x = self.x
        result = x.new_empty(len(x), len(self.matrix))
        buffer = workspace("values", x, self.multiplied, self.width)
        for rows in blocks(0, len(x), self.multiplied):
            basis = buffer[: rows.stop - rows.start]
            self.evaluate(x[rows], basis)
            torch.mm(basis, self.matrix.t(), out=result[rows])
            if self.is_separate:
                result[rows].addmm_(basis @ self.right.t(), self.left.t())
        return result

    def gradients(self, gradient: Tensor, needed: Sequence[bool]) -> Gradients:
        """Compute the gradients of x, weight, left and right; None where not needed."""
        x, left = self.x, self.left
        values_buffer = workspace("values", x, self.multiplied, self.width)
        grad_buffer = workspace("gradients", x, self.multiplied, self.width) if needed[0] else values_buffer
        grad_x = torch.empty_like(x) if needed[0] else None
        # Transposed: the product that gives it so takes less time.
        grad_matrix = x.new_zeros(self.width, len(self.matrix)) if needed[1] else None
        grad_left = torch.zeros_like(left) if needed[2] else None
        grad_right = torch.zeros_like(self.right) if needed[3] else None
        for rows in blocks(0, len(x), self.multiplied):
            values, grad_y = values_buffer[: rows.stop - rows.start], gradient[rows]
            thin: Any = None if left is None else grad_y @ left
            if grad_x is not None:
                grad_basis = torch.mm(grad_y, self.matrix, out=grad_buffer[: len(values)])
                if self.is_separate:
                    grad_basis.addmm_(thin, self.right)
                self.evaluate(x[rows], values, grad_basis, grad_x[rows])
            else:
                self.evaluate(x[rows], values)
            if grad_matrix is not None:
                grad_matrix.addmm_(values.t(), grad_y)
            if grad_left is not None:
                grad_left.addmm_(grad_y.t(), values @ self.right.t())
            if grad_right is not None:
                grad_right.addmm_(thin.t(), values)
        grad_weight = None if grad_matrix is None else self._as_coefficients(grad_matrix.t().contiguous())
        grad_right = None if grad_right is None else self._as_coefficients(grad_right)
        return grad_x, grad_weight, grad_left, grad_right

    def _as_coefficients(self, matrix: Tensor) -> Tensor:
        """The matrix as a tensor (O or r, I, K)."""
        return matrix.view(-1, *self.split).permute(self.modes)
