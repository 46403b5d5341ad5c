# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`spline_product` on large grids: gathers the coefficients of the basis functions that are not zero at a point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import UniformGrid, cardinal_spline
from .memory import EVALUATED, blocks


# Gathering coefficients costs less than the product with all of them from so many basis functions for each one that is
# not zero at a point, and from so many points. Orders 1, 3 and 5 break even at 20 to 60 intervals, the fewer the wider
# the layer. `grid` of `examples/studies/benchmarks/run.py --only growth`.
_SPARSE_FROM = 10
_SPARSE_MIN_ROWS = 64


def is_sparse(x: Tensor, grid: UniformGrid) -> bool:
    """Return whether to gather the coefficients of the p + 1 functions that are not zero at a point."""
    nonzero = grid.spline_order + 1
    if grid.num_basis < _SPARSE_FROM * nonzero or len(x) < _SPARSE_MIN_ROWS:
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32


def sparse_product(x: Tensor, grid: UniformGrid, weight: Tensor) -> Tensor:
    """Compute the product (N, O) of a weight (O, I, K)."""
    table = _table(weight, grid)
    products = []
    for rows in _row_blocks(x, grid):
        start, values = _evaluate(x[rows], grid)
        index = _table_index(start, grid).flatten(1)
        product = F.embedding_bag(
            index,
            table,
            mode="sum",
            per_sample_weights=values.flatten(1),
        )
        products.append(product)
    return torch.cat(products)


def sparse_point_gradient(
    x: Tensor,
    grid: UniformGrid,
    weight: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Compute the gradient (N, I) of the points from the gradient (N, O) of the product."""
    table = _table(weight, grid)
    grad_x = torch.empty_like(x)
    for rows in _row_blocks(x, grid):
        start, slopes = _evaluate(x[rows], grid, derivative=1)
        # input after input: the coefficients of one stay in the cache for all rows, which halves the time
        index = _table_index(start, grid).transpose(0, 1)
        numbers = torch.arange(len(start), device="cpu")
        row_of_entry = numbers.repeat_interleave(grid.spline_order + 1)
        row_of_entry = row_of_entry.repeat(x.shape[1])
        grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            gradient[rows].contiguous(),
            table,
            index.flatten(),
            numbers,
            row_of_entry,
            0,
            -1,
        )
        grad_values = grad_values.view_as(index).transpose(0, 1)
        grad_positions = (grad_values * slopes).sum(-1)
        grad_x[rows] = grad_positions * grid.per_unit
    return grad_x


def sparse_weight_gradient(x: Tensor, grid: UniformGrid, gradient: Tensor) -> Tensor:
    """Compute sum_n gradient[n, o] B_k(x[n, i]) (O, I, K), from sums over the points in each interval of an input."""
    order = grid.spline_order
    width = x.shape[1]
    intervals = grid.num_basis + order + 1
    start, values = _evaluate(x, grid)

    # Sort the points by their input and interval.
    first_keys = intervals * torch.arange(width, device="cpu")
    keys = start.t() + first_keys.unsqueeze(-1)
    keys, permutation = keys.flatten().sort(stable=True)
    # where each interval begins among the sorted points, as `embedding_bag` wants it
    all_keys = torch.arange(width * intervals, device="cpu")
    bags = torch.searchsorted(keys, all_keys)
    values = values.transpose(0, 1).flatten(0, 1)
    values = values[permutation]
    rows = permutation % len(x)

    # In interval j, the m-th function that is not zero is function j + m, counted from p before the basis.
    gradient = gradient.contiguous()
    result = gradient.new_zeros(width, intervals + order, gradient.shape[1])
    for m, value in enumerate(values.unbind(-1)):
        sums = F.embedding_bag(
            rows,
            gradient,
            bags,
            mode="sum",
            per_sample_weights=value.contiguous(),
        )
        result[:, m : m + intervals] += sums.unflatten(0, (width, intervals))
    of_basis = result[:, order : order + grid.num_basis]
    return of_basis.permute(2, 0, 1).contiguous()


def _row_blocks(x: Tensor, grid: UniformGrid) -> list[slice]:
    width = x.shape[1] * (grid.spline_order + 1)
    size = max(1, EVALUATED // width)
    return blocks(len(x), size)


def _evaluate(
    x: Tensor,
    grid: UniformGrid,
    derivative: int = 0,
) -> tuple[Tensor, Tensor]:
    """Evaluate the p + 1 basis functions whose support holds a point, or their slopes by position.

    Returns:
        The first of these functions (R, I), counted from p before the basis; their values (R, I, p + 1).
    """
    order = grid.spline_order
    position = grid.positions(x).clamp_(-order, grid.num_basis)
    start = position.floor()
    fraction = position - start
    centers = torch.arange(order + 1, device="cpu") - (order - 1) / 2
    offsets = fraction.unsqueeze(-1) - centers

    first = start.nan_to_num_().long() + order
    return first, cardinal_spline(offsets, order, derivative)


def _table(weight: Tensor, grid: UniformGrid) -> Tensor:
    """Return the coefficients as rows (I K', O), with zeros for functions beyond the ends of the basis."""
    padded = F.pad(weight, (grid.spline_order, grid.spline_order + 1))
    return padded.flatten(1).t().contiguous()


def _table_index(start: Tensor, grid: UniformGrid) -> Tensor:
    """Return the rows of the table (R, I, p + 1) of the functions that `_evaluate` evaluates."""
    rows_per_input = grid.num_basis + 2 * grid.spline_order + 1
    inputs = torch.arange(start.shape[1], device="cpu")
    first = start + inputs * rows_per_input
    steps = torch.arange(grid.spline_order + 1, device="cpu")
    return first.unsqueeze(-1) + steps
