# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Products of basis functions with coefficients, to which each row adds its own low-rank update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules.calls import is_tracing
from ..tucker import Rank, Tucker, Update
from .basis import UniformGrid, cardinal_spline
from .product import block_size, concatenate, sum_of_products


# The sizes of groups, and the costs of a group and of a single row, in rows of a group.
# `examples/studies/benchmarks/bank.py`
_SIZES = [2**power for power in range(1, 9)]
_COST_OF_GROUP = 4.0
_COST_OF_ROW = 1.5
# Smaller groups are multiplied by the factors of their updates: the sum with the coefficients costs more.
_THIN_BELOW = 32


class PackedTucker(NamedTuple):
    """How Tucker tensors are packed into the rows of a matrix.

    A row holds the core, and then the factors. The modes of the core are reversed and factor_out and factor_in are
    transposed, in which order products of them are fastest.

    Attributes:
        shape: (O, I, K), or with a kernel (O, I, K, P). K counts the base branch if there is one.
        form: (ro, ri, rb [, rk]); tensors of lower ranks are filled with zeros. A mode that is full in all tensors is
            "full" and has no factor. If only some tensors are full in a mode, they get the identity as factor.
    """

    shape: tuple[int, ...]
    form: tuple[Rank, ...]

    # methods instead of properties: compiled code does not know properties of tuples

    def ranks(self) -> tuple[int, ...]:
        """Return the ranks, for full modes their sizes."""
        pairs = zip(self.shape, self.form, strict=True)
        return tuple([size if rank == "full" else rank for size, rank in pairs])

    def component_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the core and of the factor of each mode; no columns for a full mode."""
        columns = [0 if rank == "full" else rank for rank in self.form]
        return [self.ranks(), *zip(self.shape, columns, strict=True)]

    def with_room_for(self, tensor: Tucker | PackedTucker) -> PackedTucker:
        """Return the form that also holds another tensor."""
        form: list[Rank] = []
        ranks = tensor.ranks if isinstance(tensor, Tucker) else tensor.ranks()
        larger = map(max, self.ranks(), ranks)
        for rank, new_rank, larger_rank in zip(self.form, tensor.form, larger, strict=True):
            # a rank of 0 means that there are no tensors yet
            if new_rank == "full" and rank in ("full", 0):
                form.append("full")
            else:
                form.append(larger_rank)
        return self._replace(form=tuple(form))

    def width(self) -> int:
        """Return the length of a row."""
        return sum(map(math.prod, self.component_shapes()))

    def unpack(self, rows: Tensor) -> list[Any]:
        """Return views (R, ...) of the components of each row (R, width); None for the factor of a full mode."""
        shapes = self.component_shapes()
        widths = list(map(math.prod, shapes))
        core, *factors = rows.split(widths, dim=1)
        ranks, *factor_shapes = shapes
        core = core.unflatten(1, ranks[::-1])
        components: list[Any] = [_reverse_modes(core)]
        for mode, (size, rank) in enumerate(factor_shapes):
            factor = None
            if rank > 0 and mode < 2:
                factor = factors[mode].unflatten(1, (rank, size)).mT
            elif rank > 0:
                factor = factors[mode].unflatten(1, (size, rank))
            components.append(factor)
        return components

    def pack(self, updates: Sequence[Update | None], like: Tensor) -> Tensor:
        """Return the matrix (len(updates), width) of updates in the dtype of `like`. None is a zero update.

        No rank of an update is above this form. The base branch may be missing.
        """
        scales = [0.0 if update is None else update.scale for update in updates]
        columns = []
        for number, shape in enumerate(self.component_shapes()):
            if 0 in shape:  # the factor of a full mode
                continue
            components = []
            for update in updates:
                component = like.new_zeros(shape) if update is None else update.tensor[number]
                if component is None or component.shape != shape:
                    component = _pad_to(shape, component, like)
                components.append(component.to(like.device))
            stacked = torch.stack(components)
            stacked = stacked.to(torch.promote_types(stacked.dtype, like.dtype))
            if number == 0:  # the core
                scale = torch.tensor(scales, dtype=torch.float64, device="cpu").to(stacked)
                stacked = scale.view(-1, *[1] * len(shape)) * stacked
            if number < 3:
                stacked = _reverse_modes(stacked)
            columns.append(stacked.flatten(1))
        return torch.cat(columns, dim=1).to(like)


def _reverse_modes(tensors: Tensor) -> Tensor:
    """Reverse the modes of each of several tensors (R, ...)."""
    modes = range(1, tensors.dim())
    return tensors.permute(0, *reversed(modes))


def _pad_to(shape: Sequence[int], tensor: Tensor | None, like: Tensor) -> Tensor:
    """Append zeros to each mode up to a shape. None stands for the identity, of the dtype of `like`."""
    if tensor is None:
        return torch.eye(*shape, dtype=like.dtype, device=like.device)
    padding = []
    for size, length in zip(reversed(shape), reversed(tensor.shape), strict=True):
        padding += [0, size - length]
    return F.pad(tensor, padding)


class RowGroups(NamedTuple):
    """The rows of a batch in groups of `size` rows that have the same update.

    Attributes:
        index: (C,), int64, the update of each group.
        size: The number of rows of a group.
        order: (C size,), the row of the batch at each position of the groups; None for groups of one row in the order
            of the batch.
        positions: (N,), the position of each row of the batch. The outputs at other positions are not used.
    """

    index: Tensor
    size: int = 1
    order: Tensor | None = None
    positions: Tensor | None = None

    def batch(self) -> int:
        """Return the number N of rows."""
        # not `len`, which `torch.export` makes a constant
        if self.positions is None:
            return self.index.shape[0]
        return self.positions.shape[0]

    def of_rows(self) -> Tensor:
        """Return the update of each row of the batch (N,)."""
        if self.positions is None:
            return self.index
        of_positions = self.index.repeat_interleave(self.size)
        return of_positions[self.positions]


def group_rows(index: Tensor) -> tuple[Tensor, RowGroups]:
    """Group the rows of a batch by their updates `index` (N,).

    An update of c rows gets ceil(c / size) groups, with the size that costs least.

    Returns:
        The distinct updates (M,), and the groups, whose index counts these.
    """
    sorted_index, sorted_rows = index.sort(stable=True)
    distinct, sorted_inverse, counts = sorted_index.unique_consecutive(return_inverse=True, return_counts=True)
    inverse = torch.empty_like(index)
    inverse.index_copy_(0, sorted_rows, sorted_inverse)
    cost_of_rows = len(index) * _COST_OF_ROW
    if len(distinct) * (_SIZES[0] + _COST_OF_GROUP) >= cost_of_rows:  # also without rows
        return distinct, RowGroups(inverse)

    sizes = torch.tensor(_SIZES, device=index.device)
    num_groups = (counts.unsqueeze(1) + sizes - 1) // sizes
    costs = num_groups.sum(0) * (sizes + _COST_OF_GROUP)
    cheapest = int(costs.argmin())
    if costs[cheapest] >= cost_of_rows:
        return distinct, RowGroups(inverse)

    size = _SIZES[cheapest]
    groups = num_groups[:, cheapest]
    updates = torch.arange(len(distinct), device=index.device)
    of_group = updates.repeat_interleave(groups)

    # Each update begins at a position that is a multiple of the size.
    first_position = (groups.cumsum(0) - groups) * size
    first_row = counts.cumsum(0) - counts
    gaps = first_position - first_row
    numbers = torch.arange(len(index), device=index.device)
    sorted_positions = numbers + gaps.repeat_interleave(counts)

    order = index.new_zeros(len(of_group) * size)
    order.index_copy_(0, sorted_positions, sorted_rows)
    positions = torch.empty_like(index)
    positions.index_copy_(0, sorted_rows, sorted_positions)
    return distinct, RowGroups(of_group, size, order, positions)


class RowUpdates(NamedTuple):
    """The updates of the rows of a batch: the rows of group c have `packed[groups.index[c]]`.

    Attributes:
        packed: (M, `form.width()`), one update in each row, in any floating dtype.
        groups: The rows of the batch by their updates.
        form: How a row is packed.
    """

    packed: Tensor
    groups: RowGroups
    form: PackedTucker


class RowProduct(NamedTuple):
    r"""y[n, o] = sum_{k,i} (W[o, i, k] + s[o, i] D_n[o, i, k]) f_k(x[n, i]), where D_n is the update of row n.

    The rows are in the order of the groups.

    Attributes:
        matrix: W as (O, K I), frozen.
        updates: The updates.
        scale: s (O, I), frozen, or None for 1. It does not scale the base branch.
        has_residual: Whether the last of the K functions is the base branch.
    """

    matrix: Tensor
    updates: RowUpdates
    scale: Tensor | None
    has_residual: bool

    def of_splines(self, x: Tensor, grid: UniformGrid, residual: Tensor | None) -> Tensor:
        """Compute the product (N, O) of the B-splines at x (N, I), and of the factors (N, I) of the base branch.

        The splines are evaluated in blocks that fit the cache.
        """
        tensors = self._tensors_of_groups(x)
        position = grid.positions(x)
        centers = grid.centers(position).unsqueeze(1)
        positions = [position]
        residuals: Any = [residual]
        tensors_of_blocks = [[tensor] for tensor in tensors]
        if not is_tracing() and len(x):
            size = self.updates.groups.size
            groups_per_block = max(1, block_size(x, grid) // size)
            rows_per_block = groups_per_block * size
            positions = position.split(rows_per_block)
            if residual is None:
                residuals = [None] * len(positions)
            else:
                residuals = residual.split(rows_per_block)
            tensors_of_blocks = [tensor.split(groups_per_block) for tensor in tensors]

        products = []
        for position, residual, *factors in zip(positions, residuals, *tensors_of_blocks, strict=True):
            offsets = position.unsqueeze(1) - centers
            functions = cardinal_spline(offsets, grid.spline_order, overwrites=True).to(x.dtype)
            if residual is not None:
                functions = torch.cat([functions, residual.unsqueeze(1)], 1)
            products.append(self._multiply(functions, *factors))
        return concatenate(products, 0)

    def of_functions(self, functions: Tensor) -> Tensor:
        """Compute the product (N, O) of functions (N, K, I)."""
        tensors = self._tensors_of_groups(functions)
        return self._multiply(functions, *tensors)

    def _tensors_of_groups(self, like: Tensor) -> list[Tensor]:
        """Return the update of each group as tensors (C, ...): its factors, or of a single row its components."""
        packed, groups, form = self.updates
        if groups.size > 1:
            return [factor.index_select(0, groups.index) for factor in self._factors(like)]
        index = groups.index.to(packed.device)
        components = form.unpack(packed.index_select(0, index).to(like))
        return [component for component in components if component is not None]

    def _multiply(self, functions: Tensor, *tensors: Tensor) -> Tensor:
        """Compute the product (R, O) of functions (R, K, I) with the result of `_tensors_of_groups`."""
        if self.updates.groups.size > 1:
            return _multiply_groups(functions, self.matrix, self._full_scale(), *tensors)
        components = iter(tensors)
        update: list[Any] = [next(components)]
        for rank in self.updates.form.form:
            update.append(None if rank == "full" else next(components))
        product = self._multiply_updates(functions, update)
        return torch.addmm(product, functions.flatten(1), self.matrix.t())

    def _factors(self, like: Tensor) -> list[Tensor]:
        """Return one or two factors of each update (M, ...), see `_multiply_groups`."""
        packed, _, form = self.updates
        core, factor_out, factor_in, factor_basis = form.unpack(packed.to(like))
        first = core.mT  # (M, ro, rb, ri)
        if factor_basis is not None:
            first = factor_basis.unsqueeze(1) @ first
        if factor_in is not None:
            first = first @ factor_in.mT.unsqueeze(1)
        first = first.flatten(2).contiguous()  # (M, ro, K I)
        return [first] if factor_out is None else [first, factor_out.mT]

    def _full_scale(self) -> Tensor | None:
        """Return the factor of each coefficient (O, K I)."""
        if self.scale is None:
            return None
        num_splines = self.updates.form.shape[2] - self.has_residual
        scales = [self.scale] * num_splines
        if self.has_residual:
            scales.append(torch.ones_like(self.scale))
        return torch.cat(scales, 1)

    def _multiply_updates(self, functions: Tensor, update: list[Any]) -> Tensor:
        """Compute the products (R, O) with updates of these components (R, ...)."""
        factor_out = update[1]
        if self.scale is None:
            sums = _multiply_thin(functions, update)
        else:
            count = functions.shape[1] - self.has_residual  # of splines
            of_splines = _slice_basis(update, 0, count)
            sums = _multiply_scaled(self.scale, functions[:, :count], of_splines)
            if self.has_residual:
                of_residual = _slice_basis(update, count, None)
                sums = sums + _multiply_thin(functions[:, count:], of_residual)
        if factor_out is None:
            return sums.squeeze(2)
        return _dot(sums, factor_out.mT, 1)


def _slice_basis(
    update: list[Any],
    start: int,
    stop: int | None,
) -> list[Any]:
    """Return the components of some slices of the basis mode."""
    core, factor_out, factor_in, factor_basis = update
    if factor_basis is None:
        return [core[..., start:stop], factor_out, factor_in, None]
    return [core, factor_out, factor_in, factor_basis[:, start:stop]]


def _multiply_thin(functions: Tensor, update: list[Any]) -> Tensor:
    """Compute the products (R, ro, 1) of functions (R, K, I) with Tucker tensors (R, ...) without factor_out."""
    core, _, factor_in, factor_basis = update
    if factor_in is not None:
        functions = torch.bmm(functions, factor_in)  # (R, K, ri)
    if factor_basis is not None:
        functions = torch.bmm(factor_basis.mT, functions)  # (R, rb, ri)
    matrix = core.permute(0, 3, 2, 1).flatten(1, 2)  # (R, rb ri, ro)
    rows = functions.flatten(1).unsqueeze(1)
    return torch.bmm(rows, matrix).mT


def _multiply_scaled(scale: Tensor, functions: Tensor, update: list[Any]) -> Tensor:
    """Compute the products with Tucker tensors that are multiplied by a scale (O, I) for each edge.

    The sum over the inputs comes last, since it contains the scale.

    Returns:
        (R, ro, O), or (R, O, 1) without factor_out.
    """
    core, factor_out, factor_in, factor_basis = update
    if factor_basis is not None:
        functions = torch.bmm(factor_basis.mT, functions)  # (R, rb, I)
    of_inputs = core.mT  # (R, ro, rb, ri)
    if factor_in is not None:
        rows = factor_in.mT[:, None, :, None]
        of_inputs = _dot(core.unsqueeze(4), rows, 2)  # (R, ro, rb, I)
    edges = _dot(of_inputs, functions.unsqueeze(1), 2)  # (R, ro, I)
    if factor_out is None:
        return (edges * scale).sum(2, keepdim=True)
    sums = edges.flatten(0, 1) @ scale.t()
    return sums.view_as(factor_out.mT)


def _dot(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Sum the products over a dimension of few entries, for which `torch.bmm` and `sum` are slower."""
    pairs = zip(first.unbind(dim), second.unbind(dim), strict=True)
    return sum_of_products(pairs)


def _multiply_groups(
    functions: Tensor,
    matrix: Tensor,
    scale: Tensor | None,
    first: Tensor,
    second: Tensor | None = None,
) -> Tensor:
    """Compute the product (R, O) of functions (R, K, I) with a matrix (O, K I) plus the scaled update of each group.

    The update is `first` (C, ro, K I) times `second` (C, ro, O), or `first` (C, O, K I).
    """
    rows = functions.flatten(1)
    groups = rows.unflatten(0, (len(first), -1))  # (C, G, K I)
    if second is not None and scale is None and groups.shape[1] < _THIN_BELOW:
        # in this order, the products of both passes are of wide matrices
        sums = torch.bmm(first, groups.mT).mT  # (C, G, ro)
        product = torch.mm(rows, matrix.t()).unflatten(0, groups.shape[:2])
        return torch.baddbmm(product, sums, second).flatten(0, 1)

    if scale is None and second is not None:
        weights = torch.baddbmm(matrix, second.mT, first)
    else:
        weights = first if second is None else torch.bmm(second.mT, first)
        weights = matrix + weights if scale is None else torch.addcmul(matrix, weights, scale)
    return torch.bmm(groups, weights.mT).flatten(0, 1)
