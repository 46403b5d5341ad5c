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

from ..tucker import Rank, Tucker, Update
from .basis import UniformGrid, bspline_basis
from .memory import blocks, workspace
from .product import Evaluator, block_sizes, is_plain_backward, needs_plain_operations, plain_gradients


# The sizes of groups, and what a group and a row by itself cost, in rows of a group.
# `examples/studies/benchmarks/bank.py`
_SIZES = [2**power for power in range(1, 9)]
_COST_OF_GROUP, _COST_OF_ROW = 4.0, 1.5


class PackedTucker(NamedTuple):
    """How Tucker tensors are packed into the rows of a matrix: the core and the factors one behind another.

    The modes of the core are reversed, factor_out and factor_in transposed, which is how a product takes them fastest.

    Attributes:
        shape: (O, I, K) or with a kernel (O, I, K, P), K with the residual branch where there is one.
        form: (ro, ri, rb [, rk]); tensors of lower ranks are filled with zeros. A mode that is full in all tensors is
            "full", and has no factor. Where it is full in some alone, they are packed with the identity as factor.
    """

    shape: tuple[int, ...]
    form: tuple[Rank, ...]

    # no properties: compiled code does not know them of tuples
    def ranks(self) -> tuple[int, ...]:
        """The ranks, the size of the mode for full modes."""
        return tuple([size if rank == "full" else rank for size, rank in zip(self.shape, self.form, strict=True)])

    def component_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of core, factor_out, factor_in and factor_basis, then that of factor_kernel if there is one.

        The factor of a full mode has no columns.
        """
        columns = [0 if rank == "full" else rank for rank in self.form]
        return [self.ranks(), *zip(self.shape, columns, strict=True)]

    def with_room_for(self, tensor: Tucker) -> PackedTucker:
        """How tensors of this form are packed together with another one."""
        pairs = zip(self.form, tensor.form, map(max, self.ranks(), tensor.ranks), strict=True)
        # a rank of 0 is that of no tensors
        form = ["full" if other == "full" and rank in ("full", 0) else larger for rank, other, larger in pairs]
        return self._replace(form=tuple(form))

    def width(self) -> int:
        """The numbers of a row."""
        return sum([math.prod(shape) for shape in self.component_shapes()])

    def unpack(self, rows: Tensor) -> list[Any]:
        """The components of each row (R, width), as views (R, ...); None for the factor of a full mode."""
        shapes = self.component_shapes()
        parts = rows.split([math.prod(shape) for shape in shapes], dim=1)
        core = parts[0].unflatten(1, shapes[0][::-1]).permute(0, *range(len(self.shape), 0, -1))
        sides = [parts[side].unflatten(1, shapes[side][::-1]).transpose(1, 2) for side in (1, 2)]
        factors = [*sides, *[part.unflatten(1, shape) for part, shape in zip(parts[3:], shapes[3:], strict=True)]]
        return [core, *[factor if shape[1] else None for factor, shape in zip(factors, shapes[1:], strict=True)]]

    def pack(self, updates: Sequence[Update | None], like: Tensor) -> Tensor:
        """The matrix (len(updates), width) of these updates, None for zero, in the dtype of `like`.

        They have these ranks or lower ones, and perhaps no residual branch.
        """
        stacked = []
        for n, shape in enumerate(self.component_shapes()):
            zero = like.new_zeros(shape)
            tensors = [zero if update is None else _pad_to(shape, update.tensor[n], like) for update in updates]
            stacked.append(torch.stack(tensors))
        core, factor_out, factor_in, *factors = stacked
        scales = [0.0 if update is None else update.scale for update in updates]
        scale = torch.tensor(scales, dtype=torch.float64, device="cpu")
        core = core * scale.to(core).view(-1, *[1] * (core.dim() - 1))
        sides = factor_out.transpose(1, 2), factor_in.transpose(1, 2)
        parts = [core.permute(0, *range(core.dim() - 1, 0, -1)), *sides, *factors]
        return torch.cat([part.flatten(1) for part in parts], dim=1).to(like)


def _pad_to(shape: Sequence[int], tensor: Tensor | None, like: Tensor) -> Tensor:
    """Fill the end of each mode with zeros, up to a shape, on the device of `like`, with its digits.

    None is the identity.
    """
    if tensor is None:
        return torch.eye(*shape, dtype=like.dtype, device=like.device)
    missing = [size - length for size, length in zip(shape, tensor.shape, strict=True)]
    padded = F.pad(tensor, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else tensor
    return padded.to(like.device, torch.promote_types(padded.dtype, like.dtype))


class RowGroups(NamedTuple):
    """The rows of a batch in groups of `size` rows that have the same update.

    Attributes:
        index: (C,), int64, the update of each group.
        size: The number of rows of a group.
        order: (C size,), the row of the batch at each place of the groups; None for groups of one row in the order of
            the batch.
        places: (N,), the place of each row of the batch. The other places are computed for nothing.
    """

    index: Tensor
    size: int = 1
    order: Tensor | None = None
    places: Tensor | None = None

    def batch(self) -> int:
        """The number N of rows."""
        # not `len`, which `torch.export` makes a constant
        return (self.index if self.places is None else self.places).shape[0]

    def of_rows(self) -> Tensor:
        """The update of each row of the batch (N,)."""
        return self.index if self.places is None else self.index.repeat_interleave(self.size)[self.places]


def group_rows(index: Tensor) -> tuple[Tensor, RowGroups]:
    """The distinct ones (M,) of the updates `index` (N,) of rows, and groups of the rows, whose index is among these.

    An update of c rows gets ceil(c / size) groups, of the size that costs least.
    """
    distinct, inverse, counts = index.unique(return_inverse=True, return_counts=True)
    sizes = torch.tensor(_SIZES, device=index.device)
    cost = (-(-counts.unsqueeze(1) // sizes)).sum(0) * (sizes + _COST_OF_GROUP)
    cheapest = int(cost.argmin())
    if cost[cheapest] >= len(index) * _COST_OF_ROW:  # also without rows
        return distinct, RowGroups(inverse)
    size = _SIZES[cheapest]
    groups = -(-counts // size)
    by_update = inverse.argsort(stable=True)
    gaps = (groups.cumsum(0) - groups) * size - (counts.cumsum(0) - counts)
    places = torch.arange(len(index), device=index.device) + gaps.repeat_interleave(counts)
    of_group = torch.arange(len(distinct), device=index.device).repeat_interleave(groups)
    order = index.new_zeros(len(of_group) * size).index_copy(0, places, by_update)
    return distinct, RowGroups(of_group, size, order, torch.empty_like(places).index_copy(0, by_update, places))


class RowUpdates(NamedTuple):
    """The updates of the rows of a batch: `packed[groups.index[c]]` is that of the rows of group c.

    Attributes:
        packed: (M, `form.width()`), one update in each row, stored in any floating dtype.
        groups: The rows that have each of them.
        form: How a row is packed.
    """

    packed: Tensor
    groups: RowGroups
    form: PackedTucker


class RowProduct(NamedTuple):
    r"""y[n, o] = sum_{k,i} (W[o, i, k] + s[o, i] D_n[o, i, k]) f_k(x[n, i]), D_n the update of row n.

    The rows are in the order of the groups.

    Attributes:
        matrix: W as (K I, O); None leaves its part out.
        updates: The updates.
        scale: s (O, I), or None for 1. It does not scale the residual branch.
        has_residual: Whether the last of the K functions is the residual branch.
    """

    matrix: Tensor | None
    updates: RowUpdates
    scale: Tensor | None
    has_residual: bool

    def of_functions(self, functions: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute the product (R, O) of the functions (R, K, I); at some rows, if the groups have one row each."""
        packed, groups, form = self.updates
        if groups.size > 1:
            factors = [factor[groups.index] for factor in self._factors(functions)]
            return _of_groups(functions.flatten(1), _weights(self.matrix, self._full_scale(), *factors))
        chosen = packed.index_select(0, groups.index[rows].to(packed.device)).to(functions)
        update = self._low_rank(functions, *form.unpack(chosen))
        return update if self.matrix is None else torch.addmm(update, functions.flatten(1), self.matrix)

    def of_splines(self, x: Tensor, grid: UniformGrid, residual: Tensor | None) -> Tensor:
        """Compute the product (N, O) of the B-splines at x (N, I), and of the factors (N, I) of the residual branch.

        The splines are evaluated once for all updates, in blocks that fit the cache; by plain operations where a
        gradient is needed for rows by themselves, or of the layer.
        """
        size, of_layer = self.updates.groups.size, (self.matrix, self.scale)
        tensors = of_layer if size > 1 else (x, residual, self.updates.packed, *of_layer)
        needs_gradient = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
        if needs_gradient or needs_plain_operations(x, grid.low, grid.high, self.matrix, residual):
            return self.of_functions(_plain_functions(x, grid, residual))
        if size > 1:
            fixed = grid, self.updates.groups, self.matrix, self._full_scale()
            return _GroupProduct.apply(*fixed, x, residual, *self._factors(x))
        functions, result = _Functions(x, grid, residual, 1), x.new_empty(len(x), self.updates.form.shape[0])
        for rows in functions.blocks:
            result[rows] = self.of_functions(functions.at(rows).unflatten(1, (-1, x.shape[1])), rows)
        return result

    def _factors(self, like: Tensor) -> list[Tensor]:
        """One or two factors of each update (M, ...), see `_weights`."""
        packed, _, form = self.updates
        core, factor_out, factor_in, factor_basis = form.unpack(packed.to(like))
        edges = core.permute(0, 3, 2, 1)  # (M, rb, ri, ro)
        if factor_out is None and factor_in is None:
            return [edges] if factor_basis is None else [factor_basis, edges]
        if factor_basis is not None:
            edges = torch.bmm(factor_basis, edges.flatten(2)).unflatten(2, edges.shape[2:])
        if factor_in is not None:
            of_inputs = torch.bmm(factor_in, edges.transpose(1, 2).flatten(2))  # (M, I, K ro)
            edges = of_inputs.unflatten(2, (-1, core.shape[1])).transpose(1, 2)  # (M, K, I, ro)
        edges = edges.flatten(1, 2)
        return [edges] if factor_out is None else [edges, factor_out.transpose(1, 2)]

    def _full_scale(self) -> Tensor | None:
        """The factor of each coefficient (K I, O)."""
        if self.scale is None:
            return None
        splines = self.updates.form.shape[2] - self.has_residual
        full = self.scale.t().repeat(splines, 1)
        return torch.cat([full, torch.ones_like(full[: self.scale.shape[1]])]) if self.has_residual else full

    def _low_rank(self, functions: Tensor, core: Tensor, factor_out: Any, factor_in: Any, factor_basis: Any) -> Tensor:
        """The part (R, O) of the updates whose components (R, ...) are given."""
        if self.scale is None:
            sums = _edges(functions, core, factor_in, factor_basis)
        else:
            # a scale of each edge is no product: the sum over the inputs comes last
            splines = functions.shape[1] - self.has_residual
            functions, residual = functions[:, :splines], functions[:, -1:]
            if factor_basis is None:
                core, mixed = core[..., :splines], core[..., -1:]
            else:
                functions = factor_basis[:, :splines].mT @ functions  # (R, rb, I)
                mixed = _dot(core, factor_basis[:, -1:].unsqueeze(1), 3).unsqueeze(3)
            if factor_in is None:
                of_inputs = core.mT  # (R, ro, rb, I)
            else:
                of_inputs = _dot(core.unsqueeze(4), factor_in.mT[:, None, :, None], 2)
            if factor_out is None:
                sums = _edges(functions, of_inputs.mT * self.scale.unsqueeze(2), None, None)
            else:
                edges = _dot(of_inputs, functions.unsqueeze(1), 2)  # (R, ro, I)
                sums = (edges.flatten(0, 1) @ self.scale.t()).view_as(factor_out.mT)  # (R, ro, O)
            if self.has_residual:
                sums = sums + _edges(residual, mixed, factor_in, None)
        return sums.squeeze(2) if factor_out is None else _dot(sums, factor_out.mT, 1)


def _edges(functions: Tensor, core: Tensor, factor_in: Tensor | None, factor_basis: Tensor | None) -> Tensor:
    """The products (R, ro, 1) of functions (R, K, I) with updates without factor_out."""
    if factor_basis is not None:
        functions = factor_basis.mT @ functions  # (R, rb, I)
    if factor_in is not None:
        functions = torch.bmm(functions, factor_in)  # (R, rb, ri)
    return torch.bmm(functions.flatten(1).unsqueeze(1), core.permute(0, 3, 2, 1).flatten(1, 2)).mT


def _dot(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """The sum of the products over a dimension of few entries: for such, `torch.bmm` and `sum` take longer."""
    (total, factor), *others = zip(first.unbind(dim), second.unbind(dim), strict=True)
    total = total * factor
    for pair in others:
        total = torch.addcmul(total, *pair)
    return total


def _plain_functions(x: Tensor, grid: UniformGrid, residual: Tensor | None) -> Tensor:
    splines = bspline_basis(x, *grid).transpose(1, 2)
    return splines if residual is None else torch.cat([splines, residual.unsqueeze(1)], 1)


class _Functions:
    """The splines, and the factors of the residual branch, in blocks of points (R, I): (R, K I).

    Attributes:
        blocks: The rows of each block, whole groups of `size` rows.
        splines: The number of columns (K I) of the splines.
    """

    def __init__(self, x: Tensor, grid: UniformGrid, residual: Tensor | None, size: int) -> None:
        evaluated, multiplied = block_sizes(x, grid)
        step = max(1, multiplied // size) * size
        self.x, self.residual = x, residual
        self.blocks = blocks(0, len(x), step)
        self.evaluator = Evaluator(x, grid, evaluated, functions_first=True)
        self.splines = self.evaluator.width
        width = self.splines + (0 if residual is None else x.shape[1])
        self.values = workspace("values", x, step, width)

    def at(self, rows: slice, *gradients: Tensor) -> Tensor:
        """Evaluate the functions; see `Evaluator.evaluate` for gradients of the splines and of all points."""
        values = self.values[: rows.stop - rows.start]
        self.evaluator.evaluate(self.x[rows], values[:, : self.splines], *gradients)
        if self.residual is not None:
            values[:, self.splines :] = self.residual[rows]
        return values


def _of_groups(functions: Tensor, weights: Tensor) -> Tensor:
    """The product (C G, O) of the functions (C G, K I) of C groups with the weights (C, K I, O) of each."""
    return torch.bmm(functions.unflatten(0, (weights.shape[0], -1)), weights).flatten(0, 1)


def _weights(matrix: Tensor | None, scale: Tensor | None, first: Tensor, *second: Tensor) -> Tensor:
    """The matrix (K I, O) plus the scaled update of each group, (C, K I, O).

    The update is (C, K I, ro) times (C, ro, O); where outputs and inputs are full, (C, K, rb) times (C, rb, I, O); or
    only the first one.
    """
    shape = first.shape[0], -1, (first, *second)[-1].shape[-1]
    others = [factor.flatten(2) for factor in second]
    if others and matrix is not None and scale is None:
        add = torch.addcmul if first.shape[2] == 1 else torch.baddbmm  # an outer product takes less time
        return add(matrix.view(first.shape[1], -1), first, *others).view(shape)
    update = (torch.bmm(first, *others) if others else first).reshape(shape)
    if matrix is None:
        return update
    return matrix + update if scale is None else torch.addcmul(matrix, update, scale)


class _GroupProduct(torch.autograd.Function):
    """The product of splines with the updates of groups, by blocks of rows in the backward pass, too."""

    @staticmethod
    def forward(ctx, grid, groups, matrix, scale, x, residual, *factors):
        ctx.save_for_backward(matrix, scale, x, residual, *factors)
        ctx.grid, ctx.groups = grid, groups
        functions, result = _Functions(x, grid, residual, groups.size), x.new_empty(len(x), factors[-1].shape[-1])
        for rows in functions.blocks:
            index = groups.index[rows.start // groups.size : rows.stop // groups.size]
            weights = _weights(matrix, scale, *(factor.index_select(0, index) for factor in factors))
            result[rows] = _of_groups(functions.at(rows), weights)
        return result

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride] (torch declares *grad_outputs)
        matrix, scale, *inputs = ctx.saved_tensors
        x, residual, *factors = inputs
        grid, groups, needed = ctx.grid, ctx.groups, ctx.needs_input_grad[4:]
        if is_plain_backward(gradient):

            def plain(x: Tensor, residual: Tensor | None, *factors: Tensor) -> list[Tensor]:
                weights = _weights(matrix, scale, *(factor[groups.index] for factor in factors))
                return [_of_groups(_plain_functions(x, grid, residual).flatten(1), weights)]

            return *[None] * 4, *plain_gradients(plain, inputs, needed, [gradient])

        functions, grad_factors = _Functions(x, grid, residual, groups.size), [*map(torch.zeros_like, factors)]
        grad_x = torch.empty_like(x) if needed[0] or needed[1] else None
        grad_residual = None if residual is None else torch.empty_like(residual)
        buffer = functions.values if grad_x is None else workspace("gradients", x, *functions.values.shape)
        for rows in functions.blocks:
            index = groups.index[rows.start // groups.size : rows.stop // groups.size]
            first, *second = [factor.index_select(0, index) for factor in factors]
            grad_y = gradient[rows].unflatten(0, (len(index), -1))
            gradients = ()
            if grad_x is not None:
                grad_functions = buffer[: rows.stop - rows.start]
                out = grad_functions.unflatten(0, (len(index), -1))
                torch.bmm(grad_y, _weights(matrix, scale, first, *second).mT, out=out)
                if grad_residual is not None:
                    grad_residual[rows] = grad_functions[:, functions.splines :]
                gradients = grad_functions[:, : functions.splines], grad_x[rows]
            grad_weights = torch.bmm(functions.at(rows, *gradients).unflatten(0, (len(index), -1)).mT, grad_y)
            if scale is not None:
                grad_weights *= scale
            for factor in second:
                grad_weights = grad_weights.view(*first.shape[:2], -1)
                grad_factors[1].index_add_(0, index, torch.bmm(first.mT, grad_weights).view_as(factor))
                grad_weights = torch.bmm(grad_weights, factor.flatten(2).mT)
            grad_factors[0].index_add_(0, index, grad_weights.view_as(first))
            del grad_weights  # the largest tensor, whose memory the next block takes
        return None, None, None, None, grad_x, grad_residual if needed[1] else None, *grad_factors
