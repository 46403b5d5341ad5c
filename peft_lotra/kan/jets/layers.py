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

"""One KAN layer applied to a jet: a value with first and second derivatives along some directions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...tucker import Update
from ..basis import UniformGrid, silu_derivatives, spline_factors
from ..layer_records import Grid, Parts, recorder_of_layer
from ..product import needs_plain_operations
from .by_hand import JetRows, LayerFeatures, LayerJet
from .few_outputs import FewOutputsJet, few_outputs


# Numbers in the largest tensor of a block of rows, where layers are applied by plain operations. Larger blocks leave
# the cache, and the allocator asks the system for fresh pages each time.
BLOCK = 2**18

# Up to so many outputs, the matrix product of `LayerJet` costs less than features by plain operations, which an update
# in factored form takes, where no factor gets a gradient. (At ranks (8, 8, 4), 128 outputs: two thirds of the time.)
MOST_OUTPUTS_DENSE = 1024


def block_size(x: Tensor, layers: list[nn.Module], directions: int) -> int | None:
    """How many rows of x (N, I) to take at a time; None for all."""
    if x.device.type != "cpu" or x.dim() != 2 or not _by_hand_pays(len(x), x):
        return None
    if not any(_has_contracted(layer, len(x) * (2 + directions)) for layer in layers):
        return None  # `LayerJet` takes blocks itself
    widest = max(own.in_features * (own.grid_size + own.spline_order + 1) for own in map(own_layer, layers))
    size = max(128, BLOCK // (widest * (2 + directions)))
    return None if size >= len(x) else -(-len(x) // -(-len(x) // size))  # blocks of about equal size


def through_layer(
    layer: nn.Module,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool = False,
) -> Parts:
    """
    (z, z', z'') to (y, y', y'') of the layer's output.

    Args:
        layer: a KAN layer, with the adapters that PEFT put around it.
        z: values, shape (..., I).
        first: derivatives along D directions, (D, ..., I), where (...) may be ones.
        second: second derivatives, (D, ..., I), or (1, ..., I) with `weights`; None if they are zero.
        weights: of the sum of the second derivatives that alone is wanted, (D,); None for each.
        only_second: whether y'' is all that is wanted; y and y' may be None then.

    Returns:
        Shapes as above, with O in the place of I.
    """
    own, dense, updates = _coefficients(layer)
    inputs = z, first, second, weights, only_second
    if (recorder := recorder_of_layer()) is not None:
        return recorder.layer(own, dense, updates, inputs, _evaluate)
    return _evaluate(own, dense, updates, *inputs)


def _evaluate(
    own: nn.Module,
    dense: tuple[Tensor, Tensor] | None,
    updates: list[Update],
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool,
) -> Parts:
    """The same, with coefficients as `_coefficients` returns them."""
    weight = None if dense is None else torch.cat([dense[0], dense[1].unsqueeze(-1)], dim=-1)
    shape = (own.out_features, own.in_features, own.grid_size + own.spline_order + 1)
    count = len(first)
    rows = z[..., 0].numel() * (1 + count + (count if weights is None else 1))
    # `LayerJet` takes weights and grids for constants
    by_hand = not any(part is not None and part.requires_grad for part in (weights, own.grid_bounds))
    by_hand = by_hand and _by_hand_pays(rows, z, first, second, *(dense or ()))
    factored = []
    for update in updates:
        if _is_contracted(rows, shape, update, by_hand):
            factored.append(update)
        else:
            delta = _dense(update, shape[-1])
            weight = delta if weight is None else weight + delta

    by_hand = by_hand and not factored and not needs_plain_operations(z, weight)
    lead = z.shape[:-1]
    z = z.reshape(-1, shape[1]).T  # rows come last from here on, where all operations run along them
    first, second = (None if part is None else _rows_last(part, lead) for part in (first, second))
    weight = None if weight is None else weight.transpose(1, 2).flatten(1)  # (O, (K + 1) I)
    if by_hand:
        function = FewOutputsJet if few_outputs(own, z) else LayerJet
        first, second = (None if part is None else part.expand(len(part), *z.shape) for part in (first, second))
        plain = partial(_by_plain_operations, own, [], weights, False)
        y = function.apply(z, first, second, weight, own.grid, weights, only_second, plain)
    else:
        y = _by_plain_operations(own, factored, weights, only_second, z, first, second, weight)
    return tuple(None if part is None else part.mT.reshape(*part.shape[:-2], *lead, shape[0]) for part in y)


def _rows_last(part: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(D, ..., I), where (...) may be ones, to (D, I, N) or (D, I, 1)."""
    rows = part.shape[1:-1].numel()
    if rows > 1:
        part, rows = part.expand(len(part), *lead, part.shape[-1]), lead.numel()
    return part.reshape(len(part), rows, part.shape[-1]).mT


def contract_updates(layer: nn.Module, updates: list[Update], x: Tensor) -> Tensor:
    """What updates add to the output of a KAN layer, (..., O)."""
    features = torch.cat([layer.basis(x), nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    features = features.reshape(1, -1, *features.shape[-2:]).permute(0, 3, 2, 1)
    parts = [_contract(features, update)[0].T for update in updates]
    return sum(parts[1:], parts[0]).reshape(*x.shape[:-1], -1) if parts else x.new_zeros(())


# By operations that autograd differentiates


def _by_plain_operations(
    layer: nn.Module,
    factored: list[Update],
    weights: Tensor | None,
    only_second: bool,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
) -> Parts:
    """As `LayerJet`, but `weight` may be None, and updates in factored form are added."""
    streams = _streams(layer, z, first, second, weights, only_second)
    if torch.compiler.is_compiling() and not factored:
        # a product for each, so that the streams need not be written into one tensor
        y = torch.stack([weight @ stream.flatten(0, 1) for stream in streams])
    else:
        stacked = torch.stack(streams)
        y = 0 if weight is None else weight @ stacked.flatten(1, 2)
        y = sum((_contract(stacked, update) for update in factored), y)
    return (None, None, y) if only_second else (y[0], y[1 : 1 + len(first)], y[1 + len(first) :])


def _streams(
    layer: nn.Module,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool = False,
) -> list[Tensor]:
    """What multiplies the coefficients: 1 + D + (D or 1) tensors (K + 1, I, N), or the last of them alone."""
    f, df, d2f = _features(layer, z)
    square = first.square()
    if weights is not None:
        square = torch.tensordot(weights, square, 1).unsqueeze(0)
    bent = [d2f * part for part in square]
    if second is not None:
        bent = [one + df * part for one, part in zip(bent, second, strict=True)]
    return bent if only_second else [f, *(df * part for part in first), *bent]


def _features(layer: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The B-splines of a layer at z (I, N) with silu as the last one, (K + 1, I, N), and their first and second
    derivatives."""
    order = layer.spline_order
    low, high = layer.grid_bounds.unsqueeze(-1).unbind(1)
    per_unit = layer.grid_size / (high - low)
    centres = torch.arange(layer.grid_size + order, dtype=z.dtype, device=z.device) - (order - 1) / 2
    offset = (z - low) * per_unit - centres[:, None, None]
    # See `bspline_basis`, whose truncated powers the three share.
    room = (order + 1) / 2 - offset.abs()
    powers = [_falling_powers(room - m, order) for m in range(order // 2 + 1)]
    factors = spline_factors(order)
    values, slopes, bends = (sum(f * power[d] for f, power in zip(factors, powers, strict=True)) for d in range(3))
    slopes = slopes * -offset.sign() * per_unit
    bends = bends * per_unit.square()
    pairs = zip((values, slopes, bends), silu_derivatives(z, 2), strict=True)
    return tuple(torch.cat([part, extra.unsqueeze(0)]) for part, extra in pairs)


def _falling_powers(room: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """max(room, 0)^p / p! and its first two derivatives in `room`, p being the order."""
    positive = torch.relu(room)
    powers = [torch.zeros_like(room), (room > 0).to(room.dtype), positive]  # p = -1, 0, 1
    for p in range(2, order + 1):
        powers.append(powers[-1] * positive / p)
    return powers[order + 1], powers[order], powers[order - 1]


# By hand: the same numbers, a fraction of the passes over memory


def _by_hand_pays(rows: int, x: Tensor, *others: Tensor | None) -> bool:
    """Not for a few rows, and not in transforms or compiled, which want plain operations."""
    return rows > 64 and not needs_plain_operations(x, *others)


@torch.no_grad()
def stream_features(
    grid: nn.Module | Grid,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool,
    evaluated: int,
) -> Tensor:
    """As `_streams`, for rows z (N, I) and the grid of a layer, but (N, 1 + D + (D or 1), K + 1, I).

    `evaluated` is how many rows the layer was evaluated at: the second derivative of quadratic splines jumps at the
    knots, and there it must be that of the same operations.
    """
    z, first, second = z.T, first.expand(len(first), *z.shape).mT, None if second is None else second.mT
    count = len(first)
    bends = count if weights is None else 1
    if grid.spline_order < 3 and not _by_hand_pays(evaluated * (1 + count + bends), z):
        return torch.stack(_streams(grid, z, first, second, weights, only_second)).permute(3, 0, 1, 2)
    block = LayerFeatures(UniformGrid(*grid.grid_bounds.unbind(-1), grid.grid_size, grid.spline_order), z)
    lines = bends if only_second else 1 + count + bends
    features = z.new_empty(z.shape[1], lines, *block.shape)
    for part in block.blocks(z.shape[1]):
        derivatives = range(1 if only_second else 0, 3 if count else 1)
        streams = JetRows(block, part, z, first, second, weights, derivatives)
        found = [] if only_second else [streams.value, *(partial(streams.first, d) for d in range(count))]
        found += [partial(streams.second, d) for d in range(bends)]
        for line, stream in enumerate(found):
            features[part, line].flatten(1).copy_(stream().T)
    return features


# Coefficients in force


def own_layer(layer: nn.Module) -> nn.Module:
    """The KAN layer under its adapters."""
    while isinstance(layer._modules.get("base_layer"), nn.Module):
        layer = layer.base_layer
    return layer


def _coefficients(layer: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor] | None, list[Update]]:
    """
    The KAN layer under the adapters, its spline_weight (O, I, K) and base_weight (O, I), and the Tucker updates in
    force.

    The coefficients of a `SlimKANLinear` are an update of nothing.
    """
    updates, added = [], {"spline_weight": [], "base_weight": []}
    while isinstance(layer._modules.get("base_layer"), nn.Module):
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as its forward does
        if hasattr(layer, "updates_in_force"):
            updates += layer.updates_in_force()
        elif not (layer.merged or layer.disable_adapters):  # PEFT's LoRA on a parameter
            adapters = [name for name in layer.active_adapters if name in layer.lora_A]
            added[layer.parameter_name] += [layer.get_delta_weight(name) for name in adapters]
        layer = layer.base_layer
    if hasattr(layer, "components"):
        return layer, None, [Update(1.0, layer.components), *updates]
    return layer, tuple(sum(more, getattr(layer, name)) for name, more in added.items()), updates


def _contracts_cheaper(rows: int, o: int, i: int, k: int, ro: int, ri: int, rb: int) -> bool:
    """
    Whether contracting the factors row by row takes fewer multiplications than building the update.

    Forward and backward. In the first case three products for each one in the forward pass; in the second the tensor
    is built and differentiated, and gets a gradient from each row. One row at a time (`vmap`), the first always wins.
    """
    thin = i * k * rb + i * rb * ri + ri * rb * ro + ro * o
    return 3 * rows * thin < 3 * o * i * k * ro + rows * o * i * k


def _is_contracted(rows: int, shape: tuple[int, int, int], update: Update, by_hand: bool) -> bool:
    """Whether an update stays in factored form; `by_hand` says whether there is the choice of `LayerJet`."""
    trained = torch.is_grad_enabled() and any(part.requires_grad for part in update.tensor)
    if by_hand and not trained and shape[0] <= MOST_OUTPUTS_DENSE:
        return False
    return _contracts_cheaper(rows, *shape, *update.tensor.ranks)


def _has_contracted(layer: nn.Module, rows: int) -> bool:
    own, _, updates = _coefficients(layer)
    shape = (own.out_features, own.in_features, own.grid_size + own.spline_order + 1)
    return any(_is_contracted(rows, shape, update, by_hand=True) for update in updates)


def _dense(update: Update, size: int) -> Tensor:
    """The update (O, I, size); without the residual branch its slice is zero."""
    dense = update.dense()
    return nn.functional.pad(dense, (0, size - dense.shape[-1]))


def _contract(streams: Tensor, update: Update) -> Tensor:
    """Features (S, K + 1, I, N) times the update, (S, O, N), by the smallest products, so that no gradient is larger
    than its factor (but for the row's features)."""
    core, factor_out, factor_in, factor_basis = update.tensor
    t = factor_basis.T @ streams[:, : len(factor_basis)].flatten(2)  # (S, rb, I N)
    t = factor_in.T @ t.unflatten(2, streams.shape[2:])  # (S, rb, ri, N)
    return (update.scale * factor_out) @ (core.transpose(1, 2).flatten(1) @ t.flatten(1, 2))
