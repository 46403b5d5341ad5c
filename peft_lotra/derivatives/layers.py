# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One KAN layer applied to a jet: a value with first and second derivatives along some directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kan.basis import UniformGrid, cardinal_spline, silu_derivatives
from ..kan.memory import MOST_OUTPUTS_DENSE, PLAIN_JET_BLOCK
from ..kan.product import needs_plain_operations
from ..tucker import Tucker, Update
from .bases import Basis, tensors_of
from .layer_jet import MOST_OUTPUTS, JetRows, LayerJet, by_hand_pays, directional, make_features
from .norms import all_rows_last, rows_first, through_norm
from .stages import Stage


class Jet(NamedTuple):
    """A value with first and second derivatives along D directions."""

    value: Tensor  # (..., O)
    first: Tensor  # (D, ..., O)
    second: Any  # (D, ..., O), or the weighted sum of them: (1, ..., O), and (..., O) for a network; None for zeros

    @property
    def parts(self) -> list[Tensor]:
        """The tensors."""
        return [part for part in self if part is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Jet:
        """`function` of each part."""
        return Jet(function(self.value), function(self.first), None if self.second is None else function(self.second))


def block_size(x: Tensor, stages: list[Stage], directions: int) -> int | None:
    """The number of rows of x (N, I) to take at a time; None for all."""
    if x.device.type != "cpu" or x.dim() != 2 or not by_hand_pays(len(x), x):
        return None
    rows, layers = len(x) * (2 + directions), [stage for stage in stages if stage.is_layer]
    if not any(_is_contracted(rows, stage.shape, update, True) for stage in layers for update in stage.updates):
        return None  # `LayerJet` takes blocks itself
    widest = max(stage.shape[1] * stage.shape[2] for stage in layers)
    size = max(128, PLAIN_JET_BLOCK // (widest * (2 + directions)))
    return None if size >= len(x) else -(-len(x) // -(-len(x) // size))  # blocks of about equal size


def evaluate_layer(stage: Stage, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None) -> Jet:
    """The jet of a KAN layer's outputs, from that of its inputs.

    The inputs are z (..., I), z' (D, ..., I), of which dimensions may be one, and z'' (D, ..., I), or None for zeros.

    With `weights` (D,), the first dimension of both second derivatives is one, and has their weighted sum.
    """
    if stage.branches:
        return _evaluate_branches(stage, z, first, second, weights)
    if stage.is_linear:
        assert stage.dense is not None
        weight, bias = stage.dense
        first = first.expand(len(first), *z.shape)
        return Jet(*Jet(z, first, second).map(lambda part: part @ weight.mT))._replace(value=F.linear(z, weight, bias))
    grid, shape, dense = stage.grid, stage.shape, stage.dense
    weight = None if dense is None else torch.cat([dense[0].mT, dense[1].unsqueeze(1)], dim=1).mT
    count = len(first)
    rows = z[..., 0].numel() * (1 + count + (count if weights is None else 1))
    by_hand = _goes_by_hand(grid, rows, weights, z, first, second, *(dense or ()))
    factored = []
    for update in stage.updates:
        if update.tensor.core.dtype != stage.layer.grid_bounds.dtype:  # a base in half precision
            dtype = stage.layer.grid_bounds.dtype
            update = update._replace(tensor=Tucker(*(part.to(dtype) for part in update.tensor)))
        if _is_contracted(rows, shape, update, by_hand):
            factored.append(update)
        else:
            delta = update.dense()
            delta = nn.functional.pad(delta, (0, shape[-1] - delta.shape[-1]))  # for the residual branch
            weight = delta if weight is None else weight + delta

    by_hand = by_hand and not factored and not (stage.updates and needs_plain_operations(z, weight))
    return _through(grid, weight, factored, by_hand, z, first, second, weights)


def _goes_by_hand(basis: Basis, rows: int, weights: Tensor | None, z: Tensor, *others: Tensor | None) -> bool:
    """True if `LayerJet` is faster, and right: the weights and the tensors that functions depend on are constants."""
    if not by_hand_pays(rows, z, *others, weights):
        return False
    constants = tensors_of(basis) if weights is None else [weights, *tensors_of(basis)]
    return not any(tensor.requires_grad for tensor in constants)


def _evaluate_branches(stage: Stage, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None) -> Jet:
    """As `evaluate_layer`, for a layer of another library."""
    found: list[Any] = []
    for branch in stage.branches:
        inputs = z, first, second
        if branch.norm is not None:
            inputs = through_norm(branch.norm, *inputs, weights)
        rows = z[..., 0].numel() * (2 + len(first))
        by_hand = _goes_by_hand(branch.basis, rows, weights, *inputs, branch.weight)
        found.append(_through(branch.basis, branch.weight, [], by_hand, *inputs, weights))
    total: list[Any] = [sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)]
    if stage.bias is not None:
        total[0] = total[0] + stage.bias
    return Jet(*total)


def _through(
    basis: Basis,
    weight: Tensor | None,
    factored: Sequence[Update],
    by_hand: bool,
    z,
    first,
    second,
    weights,
) -> Jet:
    """`evaluate_layer` for a weight (O, I, K), and updates that are added in factored form."""
    lead = z.shape[:-1]
    z, first, second = all_rows_last(z, first, second)  # all operations run along them
    weight = None if weight is None else weight.transpose(1, 2).flatten(1)  # (O, (K + 1) I)
    if by_hand:
        first = first.expand(len(first), *z.shape)
        second = None if second is None else second.expand(len(second), *z.shape)
        plain = partial(_by_plain_operations, basis, [], weights)
        y = Jet(*LayerJet.apply(z, first, second, weight, basis, weights, plain))
    else:
        y = _by_plain_operations(basis, factored, weights, z, first, second, weight)
    return y.map(lambda part: rows_first(part, lead))


def contract_updates(layer: Any, updates: list[Update], x: Tensor) -> Tensor:
    """The sum of the updates' outputs (..., O) for the inputs x of a KAN layer."""
    features = torch.cat([layer.basis(x), nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    features = features.reshape(1, -1, *features.shape[-2:]).permute(0, 3, 2, 1)
    parts = [_contract(features, update)[0].T for update in updates]
    return sum(parts[1:], parts[0]).reshape(*x.shape[:-1], -1) if parts else x.new_zeros(())


def _by_plain_operations(
    grid: Basis, factored: Sequence[Update], weights: Tensor | None, z, first, second, weight
) -> Jet:
    """As `LayerJet` by operations that autograd differentiates; `weight` may be None, and updates are added."""
    rows = _jet_rows(grid, z, first, second, weights)
    if torch.compiler.is_compiling() and weight is not None and not factored:
        # a product for each, so that the rows need not be written into one tensor, and what is not used is left out
        if len(weight) <= MOST_OUTPUTS:  # a sum that the compiler forms together with the rows
            each = weight.unflatten(1, rows[0].shape[:2]).unsqueeze(-1)
            y = [torch.stack([(one * row).sum((0, 1)) for one in each]) for row in rows]
        else:
            y = [weight @ row.flatten(0, 1) for row in rows]
        return Jet(y[0], torch.stack(y[1 : 1 + len(first)]), torch.stack(y[1 + len(first) :]))
    stacked = torch.stack(rows)
    y: Any = 0 if weight is None else weight @ stacked.flatten(1, 2)
    y = sum((_contract(stacked, update) for update in factored), y)
    return Jet(y[0], y[1 : 1 + len(first)], y[1 + len(first) :])


def _jet_rows(grid: Basis, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None) -> list[Tensor]:
    """The factors of the coefficients: f, f' z' and f'' z'^2 + f' z'', each (K + 1, I, N)."""
    f, df, d2f = _features(grid, z)
    square = first.square()
    if weights is not None:
        square = torch.tensordot(weights, square, 1).unsqueeze(0)
    of_second = [d2f * part for part in square]
    if second is not None:
        of_second = [one + df * part for one, part in zip(of_second, second, strict=True)]
    return [f, *(df * part for part in first), *of_second]


def _features(grid: Basis, z: Tensor) -> tuple[Tensor, ...]:
    """The functions of a basis at z (I, N), (K, I, N), and two derivatives of them; those of a uniform grid are the
    B-splines, and silu as the last one."""
    if not isinstance(grid, UniformGrid):
        return tuple(grid.evaluate(z, 2))
    per_unit = grid.per_unit.unsqueeze(-1)
    centers = torch.arange(grid.num_basis, dtype=z.dtype, device=z.device) - (grid.spline_order - 1) / 2
    offset = (z - grid.low.unsqueeze(-1)) * per_unit - centers[:, None, None]
    values, first, second = (cardinal_spline(offset, grid.spline_order, derivative) for derivative in range(3))
    pairs = zip((values, first * per_unit, second * per_unit.square()), silu_derivatives(z, 2), strict=True)
    f, df, d2f = (torch.cat([part, extra.unsqueeze(0)]) for part, extra in pairs)
    return f, df, d2f


@torch.no_grad()
def jet_rows(
    grid: Basis,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    evaluated: int,
) -> Tensor:
    """The factors of a layer's coefficients in `evaluate_layer`, with its arguments, for the points z (N, I).

    They are (N, S, K + 1, I) with S = 1 + D + (D or 1).

    The second derivative of quadratic splines jumps at the knots. There it must come from the same operations as in
    the jet, which depend on the number of points that the layer was `evaluated` at.
    """
    z, first, second = z.T, first.expand(len(first), *z.shape).mT, None if second is None else second.mT
    count = len(first)
    seconds = count if weights is None else 1
    if (
        isinstance(grid, UniformGrid)
        and grid.spline_order < 3
        and not by_hand_pays(evaluated * (1 + count + seconds), z)
    ):
        return torch.stack(_jet_rows(grid, z, first, second, weights)).permute(3, 0, 1, 2)
    features = make_features(grid, z)
    rows = z.new_empty(z.shape[1], 1 + count + seconds, *features.shape)
    parts = directional(features.scale, first, second, weights)
    found = JetRows(parts, (1, count, seconds))
    for part, functions in features.parts(z, found.orders(False), ()):
        for index, matrix in functions.matrices(found.rows(functions, part)):
            rows[part, index].flatten(1).copy_(matrix.T)
    return rows


def _is_contracted(rows: int, shape: tuple[int, int, int], update: Update, by_hand: bool) -> bool:
    """True if an update stays in factored form; `by_hand` is true if `LayerJet` can be taken."""
    trained = torch.is_grad_enabled() and any(part.requires_grad for part in update.tensor)
    if by_hand and not trained and shape[0] <= MOST_OUTPUTS_DENSE:
        return False
    # Forward and backward, a contraction costs three products for each one of the forward pass. A dense update is
    # built, differentiated, and gets a gradient from each row.
    (o, i, k), (ro, ri, rb) = shape, update.tensor.ranks
    thin = i * k * rb + i * rb * ri + ri * rb * ro + ro * o
    return 3 * rows * thin < 3 * o * i * k * ro + rows * o * i * k


def _contract(rows: Tensor, update: Update) -> Tensor:
    """Jet rows (S, K + 1, I, N) times the update, (S, O, N), so that no gradient of a factor is larger than it."""
    core, factor_out, factor_in, factor_basis = update.tensor
    t = factor_basis.T @ rows[:, : len(factor_basis)].flatten(2)  # (S, rb, I N)
    t = factor_in.T @ t.unflatten(2, rows.shape[2:])  # (S, rb, ri, N)
    return (update.scale * factor_out) @ (core.transpose(1, 2).flatten(1) @ t.flatten(1, 2))
