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
from torch import Tensor, nn

from ..kan.basis import UniformGrid, cardinal_spline, silu_derivatives
from ..kan.memory import MOST_OUTPUTS_DENSE, PLAIN_JET_BLOCK
from ..kan.product import needs_plain_operations
from ..tucker import Tucker, Update
from .bases import Basis, tensors_of
from .chain_rule import Jet, bell_polynomials, row_counts, sum_of_products
from .layer_jet import MOST_OUTPUTS, JetRows, LayerJet, by_hand_pays, make_features, scaled_polynomials
from .norms import through_norm
from .stages import Stage


def block_size(x: Tensor, stages: list[Stage], count: int) -> int | None:
    """The number of rows of x (N, I) to take at a time, each with `count` rows of a jet; None for all."""
    if x.device.type != "cpu" or x.dim() != 2 or not by_hand_pays(len(x), x):
        return None
    layers = [stage for stage in stages if stage.is_layer]
    if not any(_is_contracted(len(x) * count, stage.shape, u, True) for stage in layers for u in stage.updates):
        return None  # `LayerJet` takes blocks itself
    widest = max(stage.shape[1] * stage.shape[2] for stage in layers)
    size = max(128, PLAIN_JET_BLOCK // (widest * count))
    return None if size >= len(x) else -(-len(x) // -(-len(x) // size))  # blocks of about equal size


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
    grid, shape, dense = stage.module.grid, stage.shape, stage.dense
    weight = None if dense is None else torch.cat([dense[0].mT, dense[1].unsqueeze(1)], dim=1).mT
    rows = len(z) * sum(_counts(jet, order, weights))
    by_hand = _goes_by_hand(grid, rows, weights, *jet, *(dense or ()))
    factored = []
    for update in stage.updates:
        if update.tensor.core.dtype != stage.module.grid_bounds.dtype:  # a base in half precision
            dtype = stage.module.grid_bounds.dtype
            update = update._replace(tensor=Tucker(*(part.to(dtype) for part in update.tensor)))
        if _is_contracted(rows, shape, update, by_hand):
            factored.append(update)
        else:
            delta = update.dense()
            delta = nn.functional.pad(delta, (0, shape[-1] - delta.shape[-1]))  # for the residual branch
            weight = delta if weight is None else weight + delta

    by_hand = by_hand and not factored and not (stage.updates and needs_plain_operations(z, weight))
    return _through(grid, weight, factored, by_hand, jet, order, weights)


def _counts(jet: Jet, order: int, weights: Tensor | None) -> list[int]:
    return row_counts(order, len(jet[1]) if order else 0, weights)


def _goes_by_hand(basis: Basis, rows: int, weights: Tensor | None, z: Tensor, *others: Tensor | None) -> bool:
    """True if `LayerJet` is faster, and right: the weights and the tensors that functions depend on are constants."""
    if not by_hand_pays(rows, z, *others, weights):
        return False
    constants = tensors_of(basis) if weights is None else [weights, *tensors_of(basis)]
    return not any(tensor.requires_grad for tensor in constants)


def _evaluate_branches(stage: Stage, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """As `evaluate_layer`, for a layer of another library."""
    found: list[Jet] = []
    for branch in stage.branches:
        inputs = jet if branch.norm is None else through_norm(branch.norm, jet, order, weights)
        rows = len(jet[0]) * sum(_counts(jet, order, weights))
        by_hand = _goes_by_hand(branch.basis, rows, weights, *inputs, branch.weight)
        found.append(_through(branch.basis, branch.weight, [], by_hand, inputs, order, weights))
    total: list[Any] = [sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)]
    if stage.bias is not None:
        total[0] = total[0] + stage.bias
    return total


def _through(
    basis: Basis,
    weight: Tensor | None,
    factored: Sequence[Update],
    by_hand: bool,
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """`evaluate_layer` for a weight (O, I, K), and updates that are added in factored form."""
    z, *derivatives = [part.mT for part in jet]  # all operations run along the rows
    weight = None if weight is None else weight.transpose(1, 2).flatten(1)  # (O, (K + 1) I)
    plain = partial(_by_plain_operations, basis, factored, order, weights)
    if by_hand:
        derivatives = [part.expand(len(part), *z.shape) for part in derivatives]
        y = LayerJet.apply(basis, order, weights, plain, weight, z, *derivatives)
    else:
        y = plain(weight, z, *derivatives)
    return [part.mT for part in y]


def contract_updates(layer: Any, updates: list[Update], x: Tensor) -> Tensor:
    """The sum of the updates' outputs (..., O) for the inputs x of a KAN layer."""
    features = torch.cat([layer.basis(x), nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    features = features.reshape(1, -1, *features.shape[-2:]).permute(0, 3, 2, 1)
    parts = [_contract(features, update)[0].T for update in updates]
    return sum(parts[1:], parts[0]).reshape(*x.shape[:-1], -1) if parts else x.new_zeros(())


def _by_plain_operations(
    grid: Basis, factored: Sequence[Update], order: int, weights: Tensor | None, weight: Tensor | None, *jet: Tensor
) -> Jet:
    """As `LayerJet` by operations that autograd differentiates; `weight` may be None, and updates are added."""
    rows = _jet_rows(grid, list(jet), order, weights)
    stops = list(accumulate(_counts(list(jet), order, weights)))
    groups = [slice(start, stop) for start, stop in pairwise(stops)]
    if torch.compiler.is_compiling() and weight is not None and not factored:
        # a product for each, so that the rows need not be written into one tensor, and what is not used is left out
        if len(weight) <= MOST_OUTPUTS:  # a sum that the compiler forms together with the rows
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
    counts = _counts(jet, order, weights)
    if not by_hand_pays(len(z) * sum(counts), z):
        return torch.stack(_jet_rows(grid, jet, order, weights)).permute(3, 0, 1, 2)
    features = make_features(grid, jet[0])
    rows = z.new_empty(len(z), sum(counts), *features.shape)
    found = JetRows(*scaled_polynomials(features.scale, jet, order, weights), counts)
    for part, functions in features.parts(jet[0], found.orders(False), ()):
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
