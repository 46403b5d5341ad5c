# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`spline_product` on large grids: by the coefficients of the basis functions that are not zero at a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import UniformGrid, cardinal_spline
from .memory import EVALUATED, blocks


Pair = tuple[Tensor, Tensor]  # left (O, r) and right (r, I, K) of an update
Gradients = tuple[Tensor | None, ...]  # of x, weight, left and right

# Gathering coefficients costs less than the product with all of them from so many basis functions for each one that is
# not zero at a point, and from so many points. Orders 1, 3 and 5 break even at 20 to 60 intervals, the fewer the wider
# the layer. `grid` of `examples/studies/benchmarks/run.py --only growth`.
_SPARSE_FROM = 10
_SPARSE_MIN_ROWS = 64


def is_sparse(x: Tensor, grid: UniformGrid) -> bool:
    """Whether to gather the coefficients of the p + 1 functions that are not zero at a point."""
    is_large = grid.num_basis >= _SPARSE_FROM * (grid.spline_order + 1) and len(x) >= _SPARSE_MIN_ROWS
    return is_large and x.device.type == "cpu" and x.dtype == torch.float32


def sparse_product(x: Tensor, grid: UniformGrid, weight: Tensor, update: Pair | None) -> Tensor:
    """Compute the product (N, O); see `spline_product`."""
    table = _table(weight, update)
    return torch.cat([_gathered_sum(table, index, values) for _, values, index, _ in _blocks(x, grid)])


def sparse_gradients(
    x: Tensor, grid: UniformGrid, weight: Tensor, update: Pair | None, gradient: Tensor, needed: Sequence[bool]
) -> Gradients:
    """Compute the gradients of x, weight, left and right; None where not needed."""
    gradient = gradient.contiguous()
    left, right = update or (None, None)
    grad_x = torch.empty_like(x) if needed[0] else None
    grad_left = torch.zeros_like(left) if left is not None and needed[2] else None
    table = _table(weight, update) if needed[0] else None
    thin_table = right.flatten(1).t().contiguous() if right is not None and needed[2] else None
    all_values, intervals = [], []
    for rows, values, index, interval in _blocks(x, grid):
        if grad_x is not None:
            slopes, _, _ = _basis(x[rows], grid, derivative=1)
            # Input after input, so that the coefficients of one stay in the cache for all rows: half the time.
            index_by_input, slopes = index.transpose(0, 1), slopes.transpose(0, 1)
            row_of = torch.arange(len(index), device="cpu").repeat_interleave(slopes.shape[-1]).repeat(len(slopes))
            grad_basis = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                gradient[rows], table, index_by_input.flatten(), torch.arange(len(index), device="cpu"), row_of, 0, -1
            )
            grad_x[rows] = (grad_basis.view_as(slopes) * slopes).sum(-1).t() * grid.per_unit
        if grad_left is not None and thin_table is not None:
            grad_left.addmm_(gradient[rows].t(), _gathered_sum(thin_table, index, values))
        all_values.append(values)
        intervals.append(interval)
    grad_weight = grad_right = None
    if needed[1] or needed[3]:
        values, interval = torch.cat(all_values), torch.cat(intervals)
        if needed[1]:
            grad_weight = _weight_gradient(grid, values, interval, gradient)
        if left is not None and needed[3]:
            grad_right = _weight_gradient(grid, values, interval, gradient @ left)
    return grad_x, grad_weight, grad_left, grad_right


def _blocks(x: Tensor, grid: UniformGrid) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Blocks of rows, each with the results of `_basis`."""
    width = x.shape[1] * (grid.spline_order + 1)
    for rows in blocks(0, len(x), max(1, EVALUATED // width)):
        yield rows, *_basis(x[rows], grid)


def _basis(x: Tensor, grid: UniformGrid, derivative: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the p + 1 basis functions whose support holds a point.

    Returns:
        Their values (R, I, p+1), 0 for those beyond the ends of the basis; their indices i K + k; and the grid
        interval of each point (R, I), counted from p before the first.
    """
    order, num_basis = grid.spline_order, grid.num_basis
    position = ((x - grid.low) * grid.per_unit).clamp_(-order - 1, num_basis + 1)
    first = position.floor()
    which = torch.arange(order + 1, device="cpu")
    offset = (position - first).unsqueeze(-1) - (which - (order - 1) / 2).to(position)
    values = cardinal_spline(offset, order, derivative)
    first = first.nan_to_num_().long()
    index = first.unsqueeze(-1) + which
    values.masked_fill_((index < 0) | (index >= num_basis), 0)
    index = index.clamp_(0, num_basis - 1) + (torch.arange(x.shape[1], device="cpu") * num_basis).unsqueeze(-1)
    return values, index, first.clamp_(-order, num_basis - 1) + order


def _table(weight: Tensor, update: Pair | None) -> Tensor:
    """The sum of weight and update: (I K, O)."""
    total = weight.flatten(1) if update is None else torch.addmm(weight.flatten(1), update[0], update[1].flatten(1))
    return total.t().contiguous()


def _gathered_sum(table: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return F.embedding_bag(index.flatten(1), table, mode="sum", per_sample_weights=values.flatten(1))


def _weight_gradient(grid: UniformGrid, values: Tensor, interval: Tensor, gradient: Tensor) -> Tensor:
    """Compute sum_n gradient[n, o] B_k(x[n, i]) (O, I, K), from sums over the points in each interval of an input."""
    (size, width), order, num_basis = interval.shape, grid.spline_order, grid.num_basis
    bins = num_basis + order
    keys = interval.t() + torch.arange(width, device="cpu").unsqueeze(-1) * bins
    keys, permutation = keys.flatten().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(width * bins, device="cpu"))
    values = values.transpose(0, 1).flatten(0, 1)[permutation]
    rows = permutation % size
    result = gradient.new_zeros(width, num_basis, gradient.shape[1])
    for m, value in enumerate(values.unbind(-1)):
        sums = F.embedding_bag(rows, gradient, starts, mode="sum", per_sample_weights=value.contiguous())
        result += sums.unflatten(0, (width, bins))[:, order - m : order - m + num_basis]
    return result.permute(2, 0, 1).contiguous()
