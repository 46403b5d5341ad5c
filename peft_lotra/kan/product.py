# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The product of a B-spline basis with coefficients, y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .basis import TruncatedPowers, bspline_basis, in_transform, integer_power, is_batched, spline_values
from .memory import EVALUATED, MIN_ROWS, MULTIPLIED, OFF_CPU, blocks, workspace
from .sparse_product import Gradients, Pair, Points, is_sparse, sparse_gradients, sparse_product


# From so many points for each output, and so many inputs, rows ordered (K, I) save more in the evaluation than the
# coefficients in that order cost; from so many points, too, the sum of weight and update costs less than a product
# with both. Series `width` and `batch` of `examples/studies/benchmarks/run.py --only growth`.
_FORM_FROM = 4
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
    The basis is formed whole by plain operations, and in a backward pass that is itself differentiated.
    """
    left, right = update or (None, None)
    ends_vary = any(isinstance(end, Tensor) and end.requires_grad for end in (low, high))
    if ends_vary or needs_plain_operations(x, low, high, weight, left, right):
        basis = bspline_basis(x, low, high, grid_size, spline_order).flatten(1)
        y = F.linear(basis, weight.flatten(1))
        return y if update is None else y + F.linear(F.linear(basis, update[1].flatten(1)), update[0])
    low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high))
    return _SplineProduct.apply(x, low, grid_size / (high - low), spline_order, weight, left, right)


def needs_plain_operations(x: Tensor, *others: Tensor | float | None) -> bool:
    """Whether operations that write into memory must give way to those that all of torch knows."""
    if (
        torch.compiler.is_compiling()  # which fuses them itself
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
    def forward(ctx, x, low, scale, spline_order, weight, left, right):
        points = Points(x, low, scale, weight.shape[-1], spline_order)
        ctx.save_for_backward(x, low, scale, weight, left, right)
        ctx.spline_order = spline_order
        product = sparse_product if is_sparse(points) else _dense_product
        return product(points, weight, None if left is None else (left, right))

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        x, low, scale, weight, left, right = ctx.saved_tensors
        points = Points(x, low, scale, weight.shape[-1], ctx.spline_order)
        if torch.is_grad_enabled() or is_batched(gradient):  # by `create_graph`, or by `is_grads_batched`
            gradients = _differentiable_gradients
        else:
            gradients = sparse_gradients if is_sparse(points) else _dense_gradients
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        results = gradients(points, weight, None if left is None else (left, right), gradient, needed)
        return results[0], None, None, None, *results[1:]


def _differentiable_gradients(
    points: Points, weight: Tensor, update: Pair | None, gradient: Tensor, needed: Sequence[bool]
) -> Gradients:
    """The gradients in operations that can be differentiated again."""
    towards_x = towards_weight = towards_left = towards_right = None
    if needed[0]:
        slopes = spline_values(points.position, points.num_basis, points.spline_order, derivative=1)
        towards = gradient @ weight.flatten(1)
        towards = towards if update is None else towards + gradient @ update[0] @ update[1].flatten(1)
        towards_x = (towards.view_as(slopes) * slopes).sum(-1) * points.scale
    if any(needed[1:]):
        basis = spline_values(points.position, points.num_basis, points.spline_order).flatten(1)
        if needed[1]:
            towards_weight = (gradient.t() @ basis).view_as(weight)
        if update is not None:
            left, right = update
            towards_left = gradient.t() @ (basis @ right.flatten(1).t()) if needed[2] else None
            towards_right = ((gradient @ left).t() @ basis).view_as(right) if needed[3] else None
    return towards_x, towards_weight, towards_left, towards_right


class _Evaluator:
    """Evaluates up to `rows` rows of the basis, and of its slopes, in the same memory; `functions_first` orders a row
    (K, I), so that operations between a number for each input and all basis functions run along the inputs."""

    def __init__(self, points: Points, rows: int, functions_first: bool) -> None:
        inputs = points.x.shape[1]
        self.points = points
        self.functions_first = functions_first
        self.powers = TruncatedPowers(points.spline_order, points.num_basis, points.x)
        self.scale = points.scale * self.powers.unit
        self.centers = self.powers.centers if functions_first else self.powers.centers.repeat(inputs)
        buffers = 1 + 2 * len(self.powers.factors)
        self.scratch = workspace("scratch", points.x, buffers, min(rows, len(points.x)), inputs * points.num_basis)

    def _offsets_into(self, out: Tensor, rows: slice) -> Tensor:
        position = (self.points.x[rows] - self.points.low) * self.scale
        if self.functions_first:
            split = out.unflatten(1, (self.points.num_basis, -1))
            torch.sub(position.unsqueeze(1), self.centers.unsqueeze(-1), out=split)
            return out
        out.unflatten(1, (-1, self.points.num_basis)).copy_(position.unsqueeze(-1))
        return out.sub_(self.centers)  # a row: subtracting while broadcasting both is slower

    def values(self, rows: slice, out: Tensor) -> None:
        """Writes the basis functions (R, I K) at rows of the points."""
        first, *others = self.scratch[: len(self.powers.factors), : len(out)]
        distances = self.powers.distances(self._offsets_into(first, rows).abs_(), others)
        self.powers.sum_into(out, [integer_power(t, self.points.spline_order, out=t) for t in distances])

    def gradients(self, rows: slice, towards: Tensor, out: Tensor, values: Tensor | None) -> None:
        """Writes into `out` (R, I) the gradient towards the points, from `towards` (R, I K), the gradient towards the
        basis functions, which is overwritten; and into `values`, if given, the basis functions."""
        count, order = len(self.powers.factors), self.points.spline_order
        offsets, first, *scratch = self.scratch[:, : len(out)]
        self._offsets_into(offsets, rows)
        distances = self.powers.distances(torch.abs(offsets, out=first), scratch[: count - 1])
        pairs = zip(distances, scratch[count - 1 :], strict=True)
        powers = [integer_power(t, order - 1, out=buffer) for t, buffer in pairs]
        if values is not None:
            self.powers.sum_into(values, [t.mul_(power) for t, power in zip(distances, powers, strict=True)])
        # M_p rises up to its center, and falls from there.
        towards.mul_(self.powers.sum_into(powers[0], powers).copysign_(offsets))
        split = (self.points.num_basis, -1) if self.functions_first else (-1, self.points.num_basis)
        torch.sum(towards.unflatten(1, split), dim=1 if self.functions_first else 2, out=out)
        out.mul_(self.scale * -order)


class _Arrangement(NamedTuple):
    """How the product is formed, from the coefficients as matrices in the order of the basis' rows."""

    functions_first: bool
    matrix: Tensor  # (O, I K): the weight, or its sum with the update
    update: Pair | None  # (O, r) and (r, I K)
    separate: Pair | None  # the update, if `matrix` is without it

    def restore(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The matrix as a tensor of (O or r, I, K)."""
        if self.functions_first:
            return matrix.unflatten(1, (shape[2], shape[1])).transpose(1, 2)
        return matrix.view(shape)


def _arrange(points: Points, weight: Tensor, update: Pair | None) -> _Arrangement:
    many = len(points.x) >= _FORM_FROM * len(weight)
    functions_first = many and points.x.shape[1] >= _FUNCTIONS_FIRST_FROM
    order = (0, 2, 1) if functions_first else (0, 1, 2)
    matrix = weight.permute(order).flatten(1)
    if update is not None:
        update = update[0], update[1].permute(order).flatten(1)
        if many:
            matrix = torch.addmm(matrix, *update)
    return _Arrangement(functions_first, matrix, update, None if many else update)


def _block_sizes(points: Points) -> tuple[int, int]:
    """How many rows of the basis are evaluated at a time, and how many enter a matrix product."""
    width = max(1, points.x.shape[1] * points.num_basis)
    if points.x.device.type != "cpu":
        return max(1, OFF_CPU // width), max(1, OFF_CPU // width)
    fewest = min(max(MIN_ROWS[0], width // 16), MIN_ROWS[1])
    return max(1, EVALUATED // width), max(fewest, MULTIPLIED // width)


def _dense_product(points: Points, weight: Tensor, update: Pair | None) -> Tensor:
    """The product (N, O), by blocks of the whole basis."""
    arrangement = _arrange(points, weight, update)
    size = len(points.x)
    evaluated, multiplied = _block_sizes(points)
    evaluator = _Evaluator(points, evaluated, arrangement.functions_first)
    result = points.x.new_empty(size, len(weight))
    buffer = workspace("values", points.x, min(multiplied, size), points.x.shape[1] * points.num_basis)
    for rows in blocks(0, size, multiplied):
        basis = buffer[: rows.stop - rows.start]
        for part in blocks(rows.start, rows.stop, evaluated):
            evaluator.values(part, out=basis[part.start - rows.start : part.stop - rows.start])
        torch.mm(basis, arrangement.matrix.t(), out=result[rows])
        if arrangement.separate is not None:
            left, right = arrangement.separate
            result[rows].addmm_(basis @ right.t(), left.t())
    return result


def _dense_gradients(
    points: Points, weight: Tensor, update: Pair | None, gradient: Tensor, needed: Sequence[bool]
) -> Gradients:
    """The gradients towards x, weight, left and right, of those that are needed."""
    arrangement = _arrange(points, weight, update)
    left, right = arrangement.update or (None, None)
    size = len(points.x)
    evaluated, multiplied = _block_sizes(points)
    evaluator = _Evaluator(points, evaluated, arrangement.functions_first)
    width = points.x.shape[1] * points.num_basis
    towards_buffer = workspace("gradients", points.x, min(multiplied, size), width) if needed[0] else None
    # The thin products take the values at once; the product with the gradient takes more rows at a time.
    values_buffer = workspace("values", points.x, min(multiplied if needed[1] else evaluated, size), width)
    towards_x = torch.empty_like(points.x) if needed[0] else None
    # Transposed: the product that gives it so takes less time.
    towards_matrix = points.x.new_zeros(width, len(weight)) if needed[1] else None
    towards_left = torch.zeros_like(left) if left is not None and needed[2] else None
    towards_right = torch.zeros_like(right) if right is not None and needed[3] else None
    for rows in blocks(0, size, multiplied):
        given = gradient[rows]
        thin = None if left is None else given @ left
        if towards_buffer is not None:
            towards = towards_buffer[: len(given)]
            torch.mm(given, arrangement.matrix, out=towards)
            if arrangement.separate is not None and thin is not None:
                towards.addmm_(thin, arrangement.separate[1])
        for part in blocks(rows.start, rows.stop, evaluated):
            here = slice(part.start - rows.start, part.stop - rows.start)
            values = values_buffer[here if needed[1] else slice(part.stop - part.start)]
            if towards_x is not None:
                evaluator.gradients(part, towards[here], towards_x[part], values if any(needed[1:]) else None)
            else:
                evaluator.values(part, values)
            if towards_left is not None and right is not None:
                towards_left.addmm_(given[here].t(), values @ right.t())
            if towards_right is not None and thin is not None:
                towards_right.addmm_(thin[here].t(), values)
        if towards_matrix is not None:
            towards_matrix.addmm_(values_buffer[: len(given)].t(), given)
    towards_weight = None
    if towards_matrix is not None:
        towards_weight = arrangement.restore(towards_matrix.t().contiguous(), weight.shape)
    if update is not None and towards_right is not None:
        towards_right = arrangement.restore(towards_right, update[1].shape)
    return towards_x, towards_weight, towards_left, towards_right
