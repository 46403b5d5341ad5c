# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One KAN layer applied to a jet: a value with its derivatives along some directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kan.basis import UniformGrid, cardinal_spline, in_transform, silu_derivatives
from ..tucker import Tucker, Update
from .bases import Basis, tensors_of
from .chain_rule import Jet, bell_polynomials, row_counts, sum_of_products
from .layer_jet import JetRows, LayerJet, by_hand_pays, make_features
from .norms import through_norm
from .stages import Stage


def evaluate_layer(stage: Stage, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """The jet of a KAN layer's outputs up to an order, from that of its inputs, z (N, I) and its derivatives (D, N, I)
    or (D, 1, I).

    With `weights` (D,), those of the highest order are their weighted sum, (1, N, I).
    """
    z = jet[0]
    if stage.branches:
        return _evaluate_branches(stage, jet, order, weights)
    if stage.is_linear:
        assert stage.dense is not None
        weight, bias = stage.dense
        return [F.linear(z, weight, bias), *(part.expand(len(part), *z.shape) @ weight.mT for part in jet[1:])]
    grid, dense, dtype = stage.module.grid, stage.dense, stage.module.grid_bounds.dtype
    weight = None if dense is None else torch.cat([dense[0].mT, dense[1].unsqueeze(1)], dim=1).mT
    updates = [Update(scale, Tucker(*(part.to(dtype) for part in tensor))) for scale, tensor in stage.updates]
    if in_transform():  # a gradient of the size of the coefficients for each row (`torch.func.vmap`) is avoided
        return _through(grid, weight, updates, jet, order, weights)
    for update in updates:
        delta = update.dense()
        delta = F.pad(delta, (0, grid.num_basis + 1 - delta.shape[-1]))  # for the residual branch
        weight = delta if weight is None else weight + delta
    return _through(grid, weight, [], jet, order, weights)


def _evaluate_branches(stage: Stage, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """As `evaluate_layer`, for a layer of another library."""
    found: list[Jet] = []
    for branch in stage.branches:
        inputs = jet if branch.norm is None else through_norm(branch.norm, jet, order, weights)
        found.append(_through(branch.basis, branch.weight, [], inputs, order, weights))
    total: list[Any] = [sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)]
    if stage.bias is not None:
        total[0] = total[0] + stage.bias
    return total


def _through(
    basis: Basis,
    weight: Tensor | None,
    factored: Sequence[Update],
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """`evaluate_layer` for a weight (O, I, K), and updates that are added in factored form."""
    by_hand = by_hand_pays(len(jet[0]) * sum(row_counts(jet, order, weights)), *jet, weight, weights)
    z, *derivatives = [part.mT for part in jet]  # all operations run along the rows
    weight = None if weight is None else weight.transpose(1, 2).flatten(1)  # (O, (K + 1) I)
    plain = partial(_by_plain_operations, basis, factored, order, weights)
    # the weights of the directions, and the tensors that functions depend on, must be constants
    if by_hand and not any(it is not None and it.requires_grad for it in (weights, *tensors_of(basis))):
        derivatives = [part.expand(len(part), *z.shape) for part in derivatives]
        y = LayerJet.apply(basis, order, weights, plain, weight, z, *derivatives)
    else:
        y = plain(weight, z, *derivatives)
    return [part.mT for part in y]


def contract_updates(layer: Any, updates: list[Update], x: Tensor) -> Tensor:
    """The sum of the updates' outputs (..., O) for the inputs x of a KAN layer."""
    features = torch.cat([layer.basis(x), F.silu(x).unsqueeze(-1)], dim=-1)
    features = features.reshape(1, -1, *features.shape[-2:]).permute(0, 3, 2, 1)
    parts = [_contract(features, update)[0].T for update in updates]
    return sum(parts[1:], parts[0]).reshape(*x.shape[:-1], -1) if parts else x.new_zeros(())


def _by_plain_operations(
    grid: Basis, factored: Sequence[Update], order: int, weights: Tensor | None, weight: Tensor | None, *jet: Tensor
) -> Jet:
    """As `LayerJet` by operations that autograd differentiates; `weight` may be None, and updates are added."""
    rows = _jet_rows(grid, list(jet), order, weights)
    stops = list(accumulate(row_counts(jet, order, weights)))
    groups = [slice(start, stop) for start, stop in pairwise(stops)]
    if torch.compiler.is_compiling() and weight is not None and not factored:
        # a product for each, so that the rows need not be written into one tensor, and what is not used is left out
        if len(weight) <= 3:  # a sum that the compiler forms together with the rows
            each = weight.unflatten(1, rows[0].shape[:2]).unsqueeze(-1)
            y = [torch.stack([(one * row).sum((0, 1)) for one in each]) for row in rows]
        else:
            y = [weight @ row.flatten(0, 1) for row in rows]
        return [y[0], *(torch.stack(y[group]) for group in groups)]
    stacked = torch.stack(rows)
    y: Any = 0 if weight is None else weight @ stacked.flatten(1, 2)
    y = sum((_contract(stacked, update) for update in factored), y)
    return [y[0], *(y[group] for group in groups)]


def _jet_rows(grid: Basis, jet: Jet, order: int, weights: Tensor | None) -> list[Tensor]:
    """The factors of the coefficients, each (K + 1, I, N): see `JetRows`."""
    functions = _features(grid, jet[0], order)
    bells, _ = bell_polynomials(jet[1:], order, weights)
    rows = [functions[0]]
    for n in range(1, order + 1):
        found = {j: bell for (m, j), bell in bells.items() if m == n}
        of_order = [functions[j] for j in found]
        rows += [sum_of_products(zip(of_order, each, strict=True)) for each in zip(*found.values(), strict=True)]
    return rows


def _features(grid: Basis, z: Tensor, highest: int) -> list[Tensor]:
    """The functions of a basis at z (I, N), (K, I, N), and derivatives of them; those of a uniform grid are the
    B-splines, and silu as the last one."""
    if not isinstance(grid, UniformGrid):
        return grid.evaluate(z, highest)
    per_unit = grid.per_unit.unsqueeze(-1)
    centers = torch.arange(grid.num_basis, dtype=z.dtype, device=z.device) - (grid.spline_order - 1) / 2
    offset = (z - grid.low.unsqueeze(-1)) * per_unit - centers[:, None, None]
    found = []
    for d, silu in enumerate(silu_derivatives(z, highest)):
        splines = cardinal_spline(offset, grid.spline_order, d)
        found.append(torch.cat([splines * per_unit**d if d else splines, silu.unsqueeze(0)]))
    return found


@torch.no_grad()
def jet_rows(grid: Basis, jet: Jet, order: int, weights: Tensor | None) -> Tensor:
    """The factors of a layer's coefficients in `evaluate_layer`, with its arguments, for the points z (N, I).

    They are (N, S, K + 1, I) with S as `row_counts` together.

    Derivatives that jump at the knots must come from the same operations there as in the jet, which depend on the
    number of points: pass all points of the jet.
    """
    z, *derivatives = jet
    jet = [z.T, *(part.expand(len(part), *z.shape).mT for part in derivatives)]
    counts = row_counts(jet, order, weights)
    if not by_hand_pays(len(z) * sum(counts), z):
        return torch.stack(_jet_rows(grid, jet, order, weights)).permute(3, 0, 1, 2)
    features = make_features(grid, jet[0])
    rows = z.new_empty(len(z), sum(counts), *features.shape)
    found = JetRows(features.scale, jet, order, weights, counts)
    for part, functions in features.parts(jet[0], found.orders(False), ()):
        for index, matrix in functions.matrices(found.rows(functions, part)):
            rows[part, index].flatten(1).copy_(matrix.T)
    return rows


def _contract(rows: Tensor, update: Update) -> Tensor:
    """Jet rows (S, K + 1, I, N) times the update, (S, O, N), so that no gradient of a factor is larger than it."""
    core, factor_out, factor_in, factor_basis = update.tensor
    t = factor_basis.T @ rows[:, : len(factor_basis)].flatten(2)  # (S, rb, I N)
    t = factor_in.T @ t.unflatten(2, rows.shape[2:])  # (S, rb, ri, N)
    return (update.scale * factor_out) @ (core.transpose(1, 2).flatten(1) @ t.flatten(1, 2))
