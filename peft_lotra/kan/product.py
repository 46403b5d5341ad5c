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
from .memory import EVALUATED, MIN_ROWS, MULTIPLIED, OFF_CPU, blocks, workspace
from .sparse_product import Gradients, Pair, Points, is_sparse, sparse_gradients, sparse_product


# From so many points for each output the sum of weight and update costs less than a product with both; whether there
# is an update in factors at all is decided by the shapes alone, in `layers.formula`. From so many points, too, and so
# many inputs, rows ordered (K, I) save more in the evaluation than the coefficients in that order cost. Series `width`
# and `batch` of `examples/studies/benchmarks/run.py --only growth`.
_SUM_FROM = 4
_FUNCTIONS_FIRST_FROM = 16


def spline_product(
    x: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    grid_size: int,
    spline_order: int,
    weight: Tensor,
    update: Pair | None = None,
) -> Tensor:
    r"""y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), with B_k as in `bspline_basis`, W the weight (O, I, K) or, with an
    update of left (O, r) and right (r, I, K),  weight + sum_r left[o, r] right[r, i, k].

    The basis is evaluated in blocks that fit the cache, and again in the backward pass: nothing of the size (N, I, K)
    is kept. On large grids, only the coefficients of the p + 1 functions that are not zero at a point are gathered.
    Plain operations form the basis at once, as does a backward pass that is itself differentiated.
    """
    left, right = update or (None, None)
    ends_vary = any(isinstance(end, Tensor) and end.requires_grad for end in (low, high))
    if ends_vary or needs_plain_operations(x, low, high, weight, left, right):
        return plain_product(bspline_basis(x, low, high, grid_size, spline_order), weight, left, right)
    low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high))
    return _SplineProduct.apply(x, low, high, grid_size, spline_order, weight, left, right)


def plain_product(basis: Tensor, weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    basis = basis.flatten(1)
    y = F.linear(basis, weight.flatten(1))
    return y if left is None or right is None else y + F.linear(F.linear(basis, right.flatten(1)), left)


def needs_plain_operations(x: Tensor, *others: Tensor | float | None) -> bool:
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
        if isinstance(tensor, Tensor) and (
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
        points = Points(x, low, grid_size / (high - low), weight.shape[-1], spline_order)
        update = None if left is None else (left, right)
        return (
            sparse_product(points, weight, update) if is_sparse(points) else _Dense(points, weight, update).product()
        )

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        x, low, high, weight, left, right = ctx.saved_tensors
        points = Points(x, low, ctx.grid[0] / (high - low), weight.shape[-1], ctx.grid[1])
        update, needed = None if left is None else (left, right), (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        if is_plain_backward(gradient):
            grid = UniformGrid(low, high, *ctx.grid)
            plain = lambda x, *others: [plain_product(_Basis.apply(x, grid, 0), *others)]  # noqa: E731
            results = plain_gradients(plain, (x, weight, left, right), needed, [gradient])
        elif is_sparse(points):
            results = sparse_gradients(points, weight, update, gradient, needed)
        else:
            results = _Dense(points, weight, update).gradients(weight.shape, gradient, needed)
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
        inputs = [None if part is None else part.view_as(part) for part in inputs]  # one may depend on another
        pairs = [(y, grad) for y, grad in zip(function(*inputs), grads, strict=True) if grad is not None]
        wanted: Any = [part for part, asked in zip(inputs, needed, strict=True) if asked]
        if not pairs:
            return [None] * len(inputs)
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=differentiable, allow_unused=True))
    return [next(found) if asked else None for asked in needed]


@lru_cache(maxsize=64)
def _power_constants(
    spline_order: int, num_basis: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, Tensor, Tensor]:
    """The length of a grid interval with unit^p = 1 / p!, half the width of a support, and the centers (K,)."""
    unit = math.factorial(spline_order) ** (-1 / spline_order)
    with torch.inference_mode(False):  # see `workspace`
        centers = (torch.arange(num_basis, dtype=dtype, device=device) - (spline_order - 1) / 2) * unit
        return unit, torch.tensor((spline_order + 1) / 2 * unit, dtype=dtype, device=device), centers


@lru_cache(maxsize=256)
def block_sizes(shape: torch.Size, num_basis: int, device: torch.device) -> tuple[int, int]:
    """How many rows of the basis of points (N, I) are evaluated at a time, and how many enter a matrix product."""
    size, inputs = shape
    width = max(1, inputs * num_basis)
    evaluated, multiplied, fewest = EVALUATED, MULTIPLIED, min(max(MIN_ROWS[0], width // 16), MIN_ROWS[1])
    if device.type != "cpu":
        evaluated, multiplied, fewest = OFF_CPU, OFF_CPU, 1
    return max(1, min(evaluated // width, size)), max(1, min(max(fewest, multiplied // width), size))


class Evaluator:
    """The whole basis at up to `rows` points at a time, in the same memory.

    The truncated powers of `bspline_basis` are those of t_m = max(half_width - |offset| - m unit, 0), in a unit of
    length in which no pass divides by p!. With `functions_first` a row is ordered (K, I) instead of (I, K), so that
    operations between a number for each input and all basis functions run along the inputs.
    """

    def __init__(self, points: Points, rows: int, functions_first: bool) -> None:
        self.points, self.functions_first = points, functions_first
        inputs = points.x.shape[1]
        self.width = max(1, inputs * points.num_basis)
        self.factors = spline_factors(points.spline_order)
        constants = _power_constants(points.spline_order, points.num_basis, points.x.dtype, points.x.device)
        self.unit, self.half_width, centers = constants
        self.scale = points.scale * self.unit
        self.centers = centers if functions_first else centers.repeat(inputs)
        self.scratch = workspace("scratch", points.x, 1 + 2 * len(self.factors), rows, self.width)

    def evaluate(self, rows: slice, out: Tensor) -> None:
        """Writes the basis functions (R, I K) at rows of the points."""
        first, *others = self.scratch[: len(self.factors), : len(out)]
        distances = self._distances(self._offsets_into(first, rows).abs_(), others)
        self._sum_into(out, [integer_power(t, self.points.spline_order, out=t) for t in distances])

    def differentiate(self, rows: slice, grad_basis: Tensor, out: Tensor, values: Tensor | None) -> None:
        """Writes the gradient of the points (R, I) into `out`, and the basis functions into `values`, if given.

        `grad_basis` (R, I K), the gradient of the basis functions, is overwritten.
        """
        count, order = len(self.factors), self.points.spline_order
        offsets, first, *scratch = self.scratch[:, : len(out)]
        self._offsets_into(offsets, rows)
        distances = self._distances(torch.abs(offsets, out=first), scratch[: count - 1])
        pairs = zip(distances, scratch[count - 1 :], strict=True)
        powers = [integer_power(t, order - 1, out=buffer) for t, buffer in pairs]
        if values is not None:
            self._sum_into(values, [t.mul_(power) for t, power in zip(distances, powers, strict=True)])
        # M_p rises up to its center, and falls from there.
        grad_basis.mul_(self._sum_into(powers[0], powers).copysign_(offsets))
        split = (self.points.num_basis, -1) if self.functions_first else (-1, self.points.num_basis)
        torch.sum(grad_basis.unflatten(1, split), dim=1 if self.functions_first else 2, out=out)
        out.mul_(self.scale * -order)

    def _offsets_into(self, out: Tensor, rows: slice) -> Tensor:
        """Writes the offsets of the points from the centers."""
        position = (self.points.x[rows] - self.points.low) * self.scale
        if self.functions_first:
            split = out.unflatten(1, (self.points.num_basis, -1))
            torch.sub(position.unsqueeze(1), self.centers.unsqueeze(-1), out=split)
            return out
        out.unflatten(1, (-1, self.points.num_basis)).copy_(position.unsqueeze(-1))
        return out.sub_(self.centers)  # a row: subtracting while broadcasting both is slower

    def _distances(self, offsets: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """The t_m, in the memory of `offsets`, which holds |offset|, and of `others`."""
        found = [torch.sub(self.half_width, offsets, out=offsets).relu_()]
        for buffer in others:
            found.append(torch.sub(found[-1], self.unit, out=buffer).relu_())
        return found

    def _sum_into(self, out: Tensor, powers: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the powers; `out` may be the first of them."""
        total = powers[0]
        for factor, power in zip(self.factors[1:], powers[1:], strict=True):
            total = torch.add(total, power, alpha=factor, out=out)
        return total if total is out else out.copy_(total)


class _Dense(Evaluator):
    """The product, by blocks of rows of the whole basis. Many rows are ordered (K, I)."""

    def __init__(self, points: Points, weight: Tensor, update: Pair | None) -> None:
        size, inputs = points.x.shape
        self.evaluated, self.multiplied = block_sizes(points.x.shape, points.num_basis, points.x.device)
        many = size >= _SUM_FROM * len(weight)
        super().__init__(points, self.evaluated, many and inputs >= _FUNCTIONS_FIRST_FROM)
        self.matrix = self._as_matrix(weight)  # (O, I K): the weight, or its sum with the update
        self.left: Any = None if update is None else update[0]
        self.right: Any = None if update is None else self._as_matrix(update[1])
        self.is_separate = update is not None and not many
        if update is not None and many:
            self.matrix = torch.addmm(self.matrix, self.left, self.right)

    def _as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor (O or r, I, K) as a matrix, in the order of the basis' rows."""
        return (tensor.transpose(1, 2) if self.functions_first else tensor).flatten(1)

    def _as_tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The matrix as the tensor of this shape (O or r, I, K)."""
        if self.functions_first:
            return matrix.unflatten(1, (shape[2], shape[1])).transpose(1, 2)
        return matrix.view(shape)

    def product(self) -> Tensor:
        """The product (N, O)."""
        x = self.points.x
        result = x.new_empty(len(x), len(self.matrix))
        buffer = workspace("values", x, self.multiplied, self.width)
        for rows in blocks(0, len(x), self.multiplied):
            basis = buffer[: rows.stop - rows.start]
            for part in blocks(rows.start, rows.stop, self.evaluated):
                self.evaluate(part, out=basis[part.start - rows.start : part.stop - rows.start])
            torch.mm(basis, self.matrix.t(), out=result[rows])
            if self.is_separate:
                result[rows].addmm_(basis @ self.right.t(), self.left.t())
        return result

    def gradients(self, weight_shape: torch.Size, gradient: Tensor, needed: Sequence[bool]) -> Gradients:
        """The gradients of x, weight, left and right; None where not needed."""
        x, left = self.points.x, self.left
        grad_buffer = workspace("gradients", x, self.multiplied, self.width) if needed[0] else None
        values_buffer = workspace("values", x, self.multiplied, self.width)
        grad_x = torch.empty_like(x) if needed[0] else None
        # Transposed: the product that gives it so takes less time.
        grad_matrix = x.new_zeros(self.width, len(self.matrix)) if needed[1] else None
        grad_left = torch.zeros_like(left) if left is not None and needed[2] else None
        grad_right = torch.zeros_like(self.right) if left is not None and needed[3] else None
        for rows in blocks(0, len(x), self.multiplied):
            given = gradient[rows]
            thin: Any = None if left is None else given @ left
            if grad_buffer is not None:
                grad_basis = torch.mm(given, self.matrix, out=grad_buffer[: len(given)])
                if self.is_separate:
                    grad_basis.addmm_(thin, self.right)
            for part in blocks(rows.start, rows.stop, self.evaluated):
                here = slice(part.start - rows.start, part.stop - rows.start)
                if grad_x is not None:
                    out = values_buffer[here] if any(needed[1:]) else None
                    self.differentiate(part, grad_basis[here], grad_x[part], out)
                else:
                    self.evaluate(part, values_buffer[here])
            values = values_buffer[: len(given)]
            if grad_left is not None:
                grad_left.addmm_(given.t(), values @ self.right.t())
            if grad_right is not None:
                grad_right.addmm_(thin.t(), values)
            if grad_matrix is not None:
                grad_matrix.addmm_(values.t(), given)
        grad_weight = None if grad_matrix is None else self._as_tensor(grad_matrix.t().contiguous(), weight_shape)
        if grad_right is not None:
            grad_right = self._as_tensor(grad_right, torch.Size([len(grad_right), *weight_shape[1:]]))
        return grad_x, grad_weight, grad_left, grad_right
