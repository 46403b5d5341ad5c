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

"""The product of a B-spline basis with coefficients, y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), as one operation."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from .basis import bspline_basis, cardinal_spline, in_transform, integer_power_, spline_factors, spline_values


# Elements of the basis (rows x inputs x basis functions) that are evaluated at a time, and that a matrix product
# takes. On the CPU, the former fit its second-level cache, where they cost a third of what they cost in main memory,
# and the latter its third. Elsewhere they only bound the memory.
_EVALUATED = 2**18
_MULTIPLIED = 2**21
_OFF_CPU = 2**26
# Elements of each of three working memories that a thread keeps.
_KEPT = 2**22
# Fewer rows cost a matrix product much of its speed; the more, the larger the matrix that is read for them.
_MIN_ROWS = (256, 512)

# From so many points for each output, and so many inputs, what an evaluation saves by rows ordered (K, I) pays for the
# coefficients in that order; from so many points, too, it costs less to form the sum of weight and update than to
# multiply by both.
_FORM_FROM = 4
_FUNCTIONS_FIRST_FROM = 16

# From so many basis functions for each one that is not zero at a point, and from so many points, gathering the
# coefficients of the latter costs less than the product with all of them (CPU, float32).
_SPARSE_FROM = 5
_SPARSE_MIN_ROWS = 64


def spline_product(
    x: torch.Tensor,
    low: torch.Tensor | float,
    high: torch.Tensor | float,
    grid_size: int,
    spline_order: int,
    weight: torch.Tensor,
    update: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""
    The sums y[n, o] = sum_{i,k} W[o, i, k] B_k(x[n, i]), with B_k as in `bspline_basis`, and W the weight or, with an
    update of rank r,  W = weight + sum_r left[o, r] right[r, i, k].

    The basis is evaluated in parts that fit the cache, and again in the backward pass: nothing of its size (N, I, K)
    is kept, or formed as a whole. A weight that needs no gradient costs none: the gradients of an update are two thin
    products. On large grids only the coefficients of the p + 1 functions that are not zero at a point are gathered, so
    that the cost does not grow with the grid.

    Under `torch.func`, forward-mode AD, `torch.compile` and autocast, and in half precision, the basis is formed as a
    whole instead, from the same formula; for a backward pass that is itself to be differentiated, too.

    Args:
        x: points, shape (N, I).
        low, high: ends of the grid, numbers or tensors that broadcast to (I,).
        grid_size: number G of intervals between `low` and `high`.
        spline_order: degree p of the splines, 1 to 5.
        weight: shape (O, I, K) with K = G + p.
        update: left (O, r) and right (r, I, K).

    Returns:
        Tensor of shape (N, O).
    """
    left, right = (None, None) if update is None else update
    if needs_plain_operations(x, low, high, weight, left, right) or _differentiates_ends(low, high):
        basis = bspline_basis(x, low, high, grid_size, spline_order).flatten(1)
        y = F.linear(basis, weight.flatten(1))
        return y if left is None else y + F.linear(F.linear(basis, right.flatten(1)), left)
    low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (low, high))
    return _SplineProduct.apply(x, low, grid_size / (high - low), spline_order, weight, left, right)


def needs_plain_operations(x: torch.Tensor, *others: torch.Tensor | float | None) -> bool:
    """Whether operations written for tensors as they lie in memory must give way to those that all of torch knows."""
    tensors = [x, *(value for value in others if isinstance(value, torch.Tensor))]
    return (
        torch.compiler.is_compiling()  # which fuses them itself
        or torch.jit.is_tracing()
        or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or in_transform()
        or any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        or any(tensor.dtype != x.dtype for tensor in tensors)
        or x.dtype not in (torch.float32, torch.float64)
        or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    )


def _differentiates_ends(*ends: torch.Tensor | float) -> bool:
    return any(isinstance(end, torch.Tensor) and end.requires_grad for end in ends)


class _SplineProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, scale, spline_order, weight, left, right):
        points = _Points(x, low, scale, weight.shape[-1], spline_order)
        ctx.save_for_backward(x, low, scale, weight, left, right)
        ctx.spline_order = spline_order
        if points.sparse:
            return _sparse_product(points, weight, left, right)
        return _dense_product(points, weight, left, right)

    @staticmethod
    def backward(ctx, gradient):
        x, low, scale, weight, left, right = ctx.saved_tensors
        points = _Points(x, low, scale, weight.shape[-1], ctx.spline_order)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        # By `create_graph`, or by `is_grads_batched`, whose tensors have no operations in given memory.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient):
            results = _differentiable_gradients(points, weight, left, right, gradient, needed)
        elif points.sparse:
            results = _sparse_gradients(points, weight, left, right, gradient, needed)
        else:
            results = _dense_gradients(points, weight, left, right, gradient, needed)
        return results[0], None, None, None, *results[1:]


class _Points(NamedTuple):
    x: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    num_basis: int
    spline_order: int

    @property
    def position(self) -> torch.Tensor:
        return (self.x - self.low) * self.scale

    @property
    def sparse(self) -> bool:
        return (
            self.num_basis >= _SPARSE_FROM * (self.spline_order + 1)
            and len(self.x) >= _SPARSE_MIN_ROWS
            and self.x.device.type == "cpu"
            and self.x.dtype == torch.float32
        )


def _differentiable_gradients(points, weight, left, right, gradient, needed):
    """The gradients in operations that can be differentiated again."""
    matrix = weight.flatten(1)
    thin = None if left is None else gradient @ left
    results = [None] * 4
    if needed[0]:
        slopes = spline_values(points.position, points.num_basis, points.spline_order, derivative=1)
        towards = gradient @ matrix
        towards = towards if left is None else towards + thin @ right.flatten(1)
        results[0] = (towards.view_as(slopes) * slopes).sum(-1) * points.scale
    if any(needed[1:]):
        basis = spline_values(points.position, points.num_basis, points.spline_order).flatten(1)
    if needed[1]:
        results[1] = (gradient.t() @ basis).view_as(weight)
    if needed[2]:
        results[2] = gradient.t() @ (basis @ right.flatten(1).t())
    if needed[3]:
        results[3] = (thin.t() @ basis).view_as(right)
    return results


#####################################
# The whole basis, a part at a time #
#####################################


class _Evaluator:
    """
    Evaluates rows of the basis, and of its slopes, by the formula of `cardinal_spline`, with as few passes over memory
    as the operations of torch allow, and in the same memory for all rows: new memory costs as much as a pass.

    Positions are counted in units of which the p-th power is p! grid intervals, so that no pass divides by p!.

    Args:
        points: the points.
        rows: how many of them are evaluated at a time.
        functions_first: whether a row is ordered (K, I) instead of (I, K). Operations between a number for each input
            and all basis functions then run along the inputs, and cost a quarter.
    """

    def __init__(self, points: _Points, rows: int, functions_first: bool) -> None:
        self.points = points
        self.functions_first = functions_first
        self.factors = spline_factors(points.spline_order)
        self.unit = math.factorial(points.spline_order) ** (-1 / points.spline_order)
        self.scale = points.scale * self.unit
        self.half_width = points.x.new_tensor((points.spline_order + 1) / 2 * self.unit)
        centres = torch.arange(points.num_basis, dtype=points.x.dtype, device=points.x.device)
        self.centres = (centres - (points.spline_order - 1) / 2) * self.unit
        if not functions_first:
            self.centres = self.centres.repeat(points.x.shape[1])
        width = points.x.shape[1] * points.num_basis
        self.scratch = _workspace("scratch", points.x, 1 + 2 * len(self.factors), min(rows, len(points.x)), width)

    def _offsets_into(self, out: torch.Tensor, rows: slice) -> torch.Tensor:
        position = (self.points.x[rows] - self.points.low) * self.scale
        if self.functions_first:
            split = out.unflatten(1, (self.points.num_basis, -1))
            torch.sub(position.unsqueeze(1), self.centres.unsqueeze(-1), out=split)
            return out
        out.unflatten(1, (-1, self.points.num_basis)).copy_(position.unsqueeze(-1))
        return out.sub_(self.centres)  # a row: subtracting while broadcasting both is slower

    def _arms(self, distances: torch.Tensor, scratch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The truncated distances, in the memory of `distances` and of `scratch`."""
        arms = [torch.sub(self.half_width, distances, out=distances).relu_()]
        for buffer in scratch:
            arms.append(torch.sub(arms[-1], self.unit, out=buffer).relu_())
        return arms

    def _sum_into(self, out: torch.Tensor, terms: list[torch.Tensor]) -> torch.Tensor:
        if len(terms) == 1:
            return out.copy_(terms[0])
        total = terms[0]
        for factor, term in zip(self.factors[1:], terms[1:], strict=True):
            total = torch.add(total, term, alpha=factor, out=out)
        return out

    def values(self, rows: slice, out: torch.Tensor) -> None:
        """Writes the basis functions (R, I K) at rows of the points."""
        distances, *scratch = self.scratch[: len(self.factors), : len(out)]
        arms = self._arms(self._offsets_into(distances, rows).abs_(), scratch)
        self._sum_into(out, [integer_power_(arm, self.points.spline_order) for arm in arms])

    def gradients(self, rows: slice, towards: torch.Tensor, out: torch.Tensor, values: torch.Tensor | None) -> None:
        """Writes into `out` (R, I) the gradient towards the points, from that towards the basis functions (R, I K),
        which is overwritten, and into `values`, if given, the basis functions."""
        count = len(self.factors)
        offsets, distances, *scratch = self.scratch[:, : len(out)]
        self._offsets_into(offsets, rows)
        arms = self._arms(torch.abs(offsets, out=distances), scratch[: count - 1])
        powers = [
            _power(arm, self.points.spline_order - 1, out=buffer)
            for arm, buffer in zip(arms, scratch[count - 1 :], strict=True)
        ]
        if values is not None:
            self._sum_into(values, [arm.mul_(power) for arm, power in zip(arms, powers, strict=True)])
        # M_p rises up to its centre, and falls from there.
        towards.mul_(self._sum_into(powers[0], powers).copysign_(offsets))
        split = (self.points.num_basis, -1) if self.functions_first else (-1, self.points.num_basis)
        torch.sum(towards.unflatten(1, split), dim=1 if self.functions_first else 2, out=out)
        out.mul_(self.scale * -self.points.spline_order)


def _power(x: torch.Tensor, n: int, out: torch.Tensor) -> torch.Tensor:
    return torch.pow(x, n, out=out) if 2 <= n <= 3 else integer_power_(out.copy_(x), n)


_kept = threading.local()


def _workspace(name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory for this call. On the CPU, if it is not much, it is that of the thread's last call of that name: new
    memory costs as much as several passes over it, in each layer and step."""
    count = math.prod(shape)
    if like.device.type != "cpu" or count > _KEPT:
        return like.new_empty(shape)
    kept = getattr(_kept, name, None)
    if kept is None or kept.dtype != like.dtype or kept.numel() < count:
        with torch.inference_mode(False):  # memory of inference mode could not be written to outside of it
            kept = like.new_empty(count)
        setattr(_kept, name, kept)
    return kept[:count].view(shape)


def _parts(start: int, stop: int, step: int) -> Iterator[slice]:
    for row in range(start, stop, step):
        yield slice(row, min(row + step, stop))


def _part_sizes(points: _Points) -> tuple[int, int]:
    """How many rows of the basis are evaluated at a time, and how many enter a matrix product."""
    width = max(1, points.x.shape[1] * points.num_basis)
    if points.x.device.type != "cpu":
        return max(1, _OFF_CPU // width), max(1, _OFF_CPU // width)
    fewest = min(max(_MIN_ROWS[0], width // 16), _MIN_ROWS[1])
    return max(1, _EVALUATED // width), max(fewest, _MULTIPLIED // width)


class _Arrangement(NamedTuple):
    """How the product is formed, from the coefficients as matrices in the order of the basis' rows."""

    functions_first: bool
    matrix: torch.Tensor  # (O, I K): the weight, or its sum with the update
    right: torch.Tensor | None  # (r, I K)
    separate: bool  # whether the update is multiplied by on its own

    def restore(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The matrix as a tensor of (O or r, I, K)."""
        if self.functions_first:
            return matrix.unflatten(1, (shape[2], shape[1])).transpose(1, 2)
        return matrix.view(shape)


def _arrange(points, weight, left, right):
    many = len(points.x) >= _FORM_FROM * len(weight)
    functions_first = many and points.x.shape[1] >= _FUNCTIONS_FIRST_FROM
    order = (0, 2, 1) if functions_first else (0, 1, 2)
    matrix = weight.permute(order).flatten(1)
    right = None if right is None else right.permute(order).flatten(1)
    if left is not None and many:
        matrix = torch.addmm(matrix, left, right)
    return _Arrangement(functions_first, matrix, right, separate=left is not None and not many)


def _dense_product(points, weight, left, right):
    arrangement = _arrange(points, weight, left, right)
    size = len(points.x)
    evaluated, multiplied = _part_sizes(points)
    evaluator = _Evaluator(points, evaluated, arrangement.functions_first)
    result = points.x.new_empty(size, len(weight))
    buffer = _workspace("values", points.x, min(multiplied, size), points.x.shape[1] * points.num_basis)
    for rows in _parts(0, size, multiplied):
        basis = buffer[: rows.stop - rows.start]
        for part in _parts(rows.start, rows.stop, evaluated):
            evaluator.values(part, out=basis[part.start - rows.start : part.stop - rows.start])
        torch.mm(basis, arrangement.matrix.t(), out=result[rows])
        if arrangement.separate:
            result[rows].addmm_(basis @ arrangement.right.t(), left.t())
    return result


def _dense_gradients(points, weight, left, right, gradient, needed):
    arrangement = _arrange(points, weight, left, right)
    size = len(points.x)
    evaluated, multiplied = _part_sizes(points)
    evaluator = _Evaluator(points, evaluated, arrangement.functions_first)
    width = points.x.shape[1] * points.num_basis
    towards_buffer = _workspace("gradients", points.x, min(multiplied, size), width) if needed[0] else None
    # The thin products take the values as soon as they are there; that with the gradient takes more at a time.
    values_buffer = _workspace("values", points.x, min(multiplied if needed[1] else evaluated, size), width)
    towards_x = torch.empty_like(points.x) if needed[0] else None
    # Transposed: the product that gives it so takes less time.
    towards_matrix = points.x.new_zeros(width, len(weight)) if needed[1] else None
    towards_left = torch.zeros_like(left) if needed[2] else None
    towards_right = points.x.new_zeros(right.shape[0], width) if needed[3] else None
    for rows in _parts(0, size, multiplied):
        given = gradient[rows]
        thin = given @ left if left is not None else None
        if needed[0]:
            towards = towards_buffer[: len(given)]
            torch.mm(given, arrangement.matrix, out=towards)
            if arrangement.separate:
                towards.addmm_(thin, arrangement.right)
        for part in _parts(rows.start, rows.stop, evaluated):
            here = slice(part.start - rows.start, part.stop - rows.start)
            values = values_buffer[here if needed[1] else slice(part.stop - part.start)]
            if needed[0]:
                evaluator.gradients(part, towards[here], towards_x[part], values if any(needed[1:]) else None)
            else:
                evaluator.values(part, values)
            if needed[2]:
                towards_left.addmm_(given[here].t(), values @ arrangement.right.t())
            if needed[3]:
                towards_right.addmm_(thin[here].t(), values)
        if needed[1]:
            towards_matrix.addmm_(values_buffer[: len(given)].t(), given)
    towards_weight = None
    if needed[1]:
        towards_weight = arrangement.restore(towards_matrix.t().contiguous(), weight.shape)
    if needed[3]:
        towards_right = arrangement.restore(towards_right, right.shape)
    return towards_x, towards_weight, towards_left, towards_right


####################################################
# Only the basis functions that are not zero there #
####################################################


def _sparse_parts(points: _Points) -> Iterator[slice]:
    width = points.x.shape[1] * (points.spline_order + 1)
    return _parts(0, len(points.x), max(1, _EVALUATED // width))


def _sparse_basis(
    points: _Points, rows: slice, derivative: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Of the p + 1 basis functions whose support holds a point: their values (R, I, p+1), 0 for those beyond the ends of
    the basis; their indices i K + k; and the grid interval of each point (R, I), counted from p before the first.
    """
    order, num_basis = points.spline_order, points.num_basis
    position = ((points.x[rows] - points.low) * points.scale).clamp_(-order - 1, num_basis + 1)
    first = position.floor()
    which = torch.arange(order + 1)
    values = cardinal_spline(
        (position - first).unsqueeze(-1) - (which - (order - 1) / 2).to(position), order, derivative
    )
    first = first.nan_to_num_().long()
    index = first.unsqueeze(-1) + which
    values.masked_fill_((index < 0) | (index >= num_basis), 0)
    index = index.clamp_(0, num_basis - 1) + (torch.arange(position.shape[1]) * num_basis).unsqueeze(-1)
    return values, index, first.clamp_(-order, num_basis - 1) + order


def _table(weight: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """The sum of weight and update: (I K, O)."""
    total = weight.flatten(1) if left is None else torch.addmm(weight.flatten(1), left, right.flatten(1))
    return total.t().contiguous()


def _gathered_sum(table: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(index.flatten(1), table, mode="sum", per_sample_weights=values.flatten(1))


def _sparse_product(points, weight, left, right):
    table = _table(weight, left, right)
    result = points.x.new_empty(len(points.x), len(weight))
    for rows in _sparse_parts(points):
        values, index, _ = _sparse_basis(points, rows)
        result[rows] = _gathered_sum(table, index, values)
    return result


def _sparse_gradients(points, weight, left, right, gradient, needed):
    gradient = gradient.contiguous()
    towards_x = torch.empty_like(points.x) if needed[0] else None
    towards_left = torch.zeros_like(left) if needed[2] else None
    table = _table(weight, left, right) if needed[0] else None
    thin_table = right.flatten(1).t().contiguous() if needed[2] else None
    parts = []
    for rows in _sparse_parts(points):
        values, index, interval = _sparse_basis(points, rows)
        if needed[0]:
            slopes, _, _ = _sparse_basis(points, rows, derivative=1)
            # Input after input, so that the coefficients of one stay in the cache for all rows: half the time.
            index_by_input, slopes = index.transpose(0, 1), slopes.transpose(0, 1)
            row_of = torch.arange(len(index)).repeat_interleave(slopes.shape[-1]).repeat(len(slopes))
            towards_basis = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                gradient[rows], table, index_by_input.flatten(), torch.arange(len(index)), row_of, 0, -1
            )
            towards_x[rows] = (towards_basis.view_as(slopes) * slopes).sum(-1).t() * points.scale
        if needed[2]:
            towards_left.addmm_(gradient[rows].t(), _gathered_sum(thin_table, index, values))
        parts.append((values, interval))
    if needed[1] or needed[3]:
        values, interval = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    towards_weight = towards_right = None
    if needed[1]:
        towards_weight = _sparse_weight_gradient(points, values, interval, gradient).view_as(weight)
    if needed[3]:
        towards_right = _sparse_weight_gradient(points, values, interval, gradient @ left).view_as(right)
    return towards_x, towards_weight, towards_left, towards_right


def _sparse_weight_gradient(points, values, interval, gradient):
    """sum_n gradient[n, o] B_k(x[n, i]) as (O, I K), out of sums over the points in each interval of each input."""
    (size, width), order, num_basis = points.x.shape, points.spline_order, points.num_basis
    bins = num_basis + order
    keys, permutation = (interval.t() + torch.arange(width).unsqueeze(-1) * bins).flatten().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(width * bins))
    values = values.transpose(0, 1).flatten(0, 1)[permutation]
    rows = permutation % size
    result = gradient.new_zeros(width, num_basis, gradient.shape[1])
    for m, value in enumerate(values.unbind(-1)):
        sums = F.embedding_bag(rows, gradient, starts, mode="sum", per_sample_weights=value.contiguous())
        result += sums.unflatten(0, (width, bins))[:, order - m : order - m + num_basis]
    return result.flatten(0, 1).t().contiguous()
