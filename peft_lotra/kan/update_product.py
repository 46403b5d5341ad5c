# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The outputs of a KAN layer with the updates that adapters add.

`compute_output` takes updates that all rows share, `compute_row_outputs` an update for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules.calls import is_tracing
from ..tucker import expand_inputs
from .basis import UniformGrid, cardinal_spline
from .formula import LayerFormula
from .product import block_size, concatenate, plain_product, spline_product, sum_of_products
from .row_updates import RowGroups, RowUpdates


# Multiplications for each output and row, in units of K, from which a second evaluation of the functions costs less
# than a gradient of the size of the coefficients: even at widths of 200 to 256.
_SHAPES_FROM = 128
# Multiplications that two thin products must save, to be worth their calls.
_THIN_FROM = 2**20
# Smaller groups are multiplied by the factors of their updates: the sum with the coefficients costs more.
_THIN_BELOW = 32


# --- updates that all rows share ---


def compute_output(formula: LayerFormula, x: Tensor) -> Tensor:
    """Return the output (..., O) of a layer for x (..., I)."""
    basis: Any = formula.basis
    coefficients: Any = formula.coefficients
    out, in_features, _ = coefficients.shape
    # the last digits of a batched product depend on what requires a gradient
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    z = rows if formula.norm is None else formula.norm(rows)

    coefficients, residual, factored, shapes = _add_updates(formula, rows.shape[0])
    weights = [coefficients]
    if factored is not None:
        weights.append(factored.right)
    functions: Any = None
    if isinstance(basis, UniformGrid):
        products = spline_product(z, basis, *weights)
    else:
        functions = formula.evaluate_basis(z)
        products = plain_product(functions, *weights)
    y = products
    sums: Any = None
    if factored is not None:
        y, sums = products.split([out, len(factored.right)], 1)

    activated: Any = None
    if residual is not None:
        activated = formula.activation(rows)
        # in the backward pass, `addmm` computes no gradient of a frozen weight
        y = torch.addmm(y, activated, residual.t())
        if factored is not None:
            sums = torch.addmm(sums, activated, factored.right_of_residual.t())
    if factored is not None:
        y = torch.addmm(y, sums, factored.left.t())
    for core, weight in shapes:
        values = _evaluate_shapes(formula, z, functions, activated, weight)
        y = torch.addmm(y, values.flatten(1), core.flatten(1).t())
    if formula.bias is not None:
        y = y + formula.bias
    # a view would cost compiled code a tenth of a step
    if x.dim() == 2:
        return y
    return y.reshape(*x.shape[:-1], out)


def _evaluate_shapes(
    formula: LayerFormula,
    z: Tensor,
    functions: Tensor,
    activated: Tensor | None,
    weights: Tensor,
) -> Tensor:
    """Return r functions of each input (N, I, r), with weights (K, r) or (K + 1, r), of normalized inputs z."""
    basis: Any = formula.basis
    if isinstance(basis, UniformGrid):
        count = basis.num_basis
        # the inputs are points of one grid
        positions = (z - basis.low) * basis.per_unit
        points = positions.reshape(-1, 1)
        low = points.new_zeros(1)
        grid = basis._replace(low=low, high=low + basis.grid_size)
        of_splines = weights[:count].t().unsqueeze(1)  # (r, 1, K)
        values = spline_product(points, grid, of_splines)
        values = values.view(*z.shape, -1)
    else:
        count = functions.shape[-1]
        values = functions @ weights[:count]
    if activated is None or len(weights) == count:
        return values
    return torch.addcmul(values, activated.unsqueeze(-1), weights[count])


def _add_updates(
    formula: LayerFormula,
    num_rows: int,
) -> tuple[Tensor, Any, _FactoredUpdate | None, list[tuple[Tensor, Tensor]]]:
    """Add the updates to the coefficients and the residual weights, but those that cost less by themselves.

    Updates with factor_out stay in factors where two thin products cost less than a sum with the coefficients.
    They do if 2 R (I K + O) < O I K, the multiplications of a backward pass for each row, unless all rows need few.
    R is the sum of the output ranks. In wide layers, updates with a full out mode are evaluated as r functions of each
    input.

    Returns:
        scale (A + updates), R + updates, the updates in factors, and of updates as functions the cores (O, I, r)
        and weights (K + 1, r).
    """
    coefficients: Any = formula.coefficients
    residual = formula.residual
    out, in_features, count = coefficients.shape
    rank_out = 0
    for _, (_, left, _, _) in formula.updates:
        if left is not None:
            rank_out += left.shape[1]
    width = in_features * count
    saved = out * width - 2 * rank_out * (width + out)  # multiplications for each row
    stays_factored = formula.scale is None and saved > 0 and (is_tracing() or num_rows * saved > _THIN_FROM)

    thin = []
    shapes = []
    for gain, (core, left, factor_in, weights) in formula.updates:
        if not isinstance(gain, float) or gain != 1.0:
            core = gain * core
        rank = count if weights is None else weights.shape[1]
        if left is None and formula.scale is None and _SHAPES_FROM * count < out * (count - 3 * rank):
            # evaluated as functions of each input
            core = expand_inputs(core, factor_in, None)
            shapes.append((core, weights))
            continue
        expanded = expand_inputs(core, factor_in, weights)
        if left is not None and stays_factored:
            right, right_of_residual = _split_residual(expanded, count)
            thin.append(_FactoredUpdate(left, right, right_of_residual))
            continue
        if left is not None:
            matrix = left @ expanded.flatten(1)
            expanded = matrix.view(out, in_features, -1)
        of_basis, of_residual = _split_residual(expanded, count)
        coefficients = coefficients + of_basis
        if residual is not None:
            residual = residual + of_residual

    factored = None
    if thin:
        factored = thin[0] if len(thin) == 1 else _concatenate(thin)
    if formula.scale is not None:
        coefficients = coefficients * formula.scale.unsqueeze(-1)
    return coefficients, residual, factored, shapes


class _FactoredUpdate(NamedTuple):
    """The update left x right of the coefficients, and left x right_of_residual of the residual weights.

    Attributes:
        left: (O, R).
        right: (R, I, K).
        right_of_residual: (R, I).
    """

    left: Tensor
    right: Tensor
    right_of_residual: Tensor


def _concatenate(updates: Sequence[_FactoredUpdate]) -> _FactoredUpdate:
    """Return the sum of updates as one product, with the sum of their ranks."""
    lefts, rights, rights_of_residual = zip(*updates, strict=True)
    return _FactoredUpdate(torch.cat(lefts, 1), torch.cat(rights), torch.cat(rights_of_residual))


def _split_residual(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split weights (..., K + 1) into the first K = `count` and the last, which is zero for weights (..., K)."""
    if weights.shape[-1] == count:
        return weights, weights.new_zeros(weights.shape[:-1])
    of_basis, of_residual = weights.split([count, 1], dim=-1)
    return of_basis, of_residual.squeeze(-1)


# --- an update for each row ---


def compute_row_outputs(formula: LayerFormula, x: Tensor, updates: RowUpdates) -> Tensor:
    """Return the output of a layer whose update differs between samples. The base is frozen.

    Args:
        x: (batch, ..., I), or (batch * count, I) with `count` rows per sample.
        updates: The updates of the samples, in place of those of the formula.
    """
    index, size, order, positions = updates.groups
    if not (is_tracing() or x.numel()):  # no group has rows
        index, size, order, positions = RowGroups(index[:0])
        count = 1
        rows = x.reshape(0, 1, x.shape[-1])
    else:
        batch = updates.groups.batch()
        if x.shape[0] == batch:
            count = x.shape[1:-1].numel()
        else:
            count = x.shape[:-1].numel() // batch
        rows = x.reshape(batch, count, updates.form.shape[1])

    if order is not None:
        rows = rows.index_select(0, order)
    grouped = updates._replace(groups=RowGroups(index, size * count))
    y = _RowProduct.of(formula, grouped).output(formula, rows.flatten(0, 1))
    if positions is not None:
        y = y.unflatten(0, (-1, count)).index_select(0, positions)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class _RowProduct(NamedTuple):
    r"""y[n, o] = sum_{k,i} (W[o, i, k] + s[o, i] D_n[o, i, k]) f_k(x[n, i]), where D_n is the update of row n.

    The rows are in the order of the groups.

    Attributes:
        matrix: W as (O, K I).
        updates: The updates.
        scale: s (O, I), or None for 1. It does not scale the base branch.
        has_residual: Whether the last of the K functions is the base branch.
    """

    matrix: Tensor
    updates: RowUpdates
    scale: Tensor | None
    has_residual: bool

    @classmethod
    def of(cls, formula: LayerFormula, updates: RowUpdates) -> _RowProduct:
        has_residual = formula.residual is not None
        matrix = formula.joined().detach()
        num_functions = matrix.shape[1] - (not has_residual)
        matrix = matrix[:, :num_functions].flatten(1)
        scale = None if formula.scale is None else formula.scale.detach()
        return cls(matrix, updates, scale, has_residual)

    def output(self, formula: LayerFormula, rows: Tensor) -> Tensor:
        """Return the output (N, O) for rows (N, I)."""
        tensors = self._tensors_of_groups(rows)
        if isinstance(formula.basis, UniformGrid):
            activated = formula.activation(rows) if self.has_residual else None
            y = self._multiply_splines(rows, formula.basis, activated, tensors)
        else:
            functions = formula.functions(rows).mT
            y = self._multiply(functions, *tensors)
        return y if formula.bias is None else y + formula.bias

    def _multiply_splines(
        self,
        x: Tensor,
        grid: UniformGrid,
        residual: Tensor | None,
        tensors: Sequence[Tensor],
    ) -> Tensor:
        """Compute the product (N, O) of the B-splines at x (N, I), and of the functions (N, I) of the base branch.

        The splines are evaluated in blocks that fit the cache.
        """
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
