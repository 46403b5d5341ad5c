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

import torch
from torch import Tensor, nn

from .basis import silu_derivatives, spline_factors
from .jet_by_hand import LayerJet
from .jet_few_outputs import FewOutputsJet, few_outputs
from .product import needs_plain_operations


# Numbers in the largest tensor of a block of rows, where layers are applied by plain operations. Larger blocks leave
# the cache, and the allocator asks the system for fresh pages each time.
BLOCK = 2**18

Parts = tuple[Tensor | None, Tensor | None, Tensor]


def block_size(x: Tensor, layers: list[nn.Module], directions: int) -> int | None:
    """How many rows of x (N, I) to take at a time; None for all."""
    if x.device.type != "cpu" or x.dim() != 2 or not _by_hand_pays(len(x), x):
        return None
    if not any(_is_contracted(layer, len(x) * (2 + directions)) for layer in layers):
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
    own, weight, updates = _coefficients(layer)
    shape = (own.out_features, own.in_features, own.grid_size + own.spline_order + 1)
    count = len(first)
    rows = z[..., 0].numel() * (1 + count + (count if weights is None else 1))
    factored = []
    for update in updates:
        if _contracts_cheaper(rows, *shape, *update[1].shape):
            factored.append(update)
        else:
            dense = _dense(*update, size=shape[-1])
            weight = dense if weight is None else weight + dense

    if not factored and _by_hand_pays(rows, z, first, second, weight):
        return _by_hand(own, weight, z, first, second, weights, only_second)
    streams = _streams(own, z, first, second, weights, only_second)
    parts = [_contract(streams, *update) for update in factored]
    if weight is not None:
        parts.insert(0, streams.flatten(-2) @ weight.flatten(1).T)
    y = sum(parts[1:], parts[0])
    return (None, None, y) if only_second else (y[0], y[1 : 1 + count], y[1 + count :])


def contract_updates(layer: nn.Module, updates: list[tuple], x: Tensor) -> Tensor:
    """What updates (scale, core, factor_out, factor_in, factor_basis) add to the output of a KAN layer, (..., O)."""
    features = torch.cat([layer.basis(x), nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    parts = [_contract(features, *update) for update in updates]
    return sum(parts[1:], parts[0]) if parts else x.new_zeros(())


# By operations that autograd differentiates


def _streams(
    layer: nn.Module,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool = False,
) -> Tensor:
    """What multiplies the coefficients: (1 + D + (D or 1), ..., I, K + 1), or the last of them alone."""
    f, df, d2f = _features(layer, z)
    square = first.square()
    if weights is not None:
        square = torch.tensordot(weights, square, 1).unsqueeze(0)
    bent = d2f * square.unsqueeze(-1)
    if second is not None:
        bent = bent + df * second.unsqueeze(-1)
    return bent if only_second else torch.cat([f.unsqueeze(0), df * first.unsqueeze(-1), bent])


def _features(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The B-splines of a layer with silu as the last one, (..., I, K + 1), and their first and second derivatives."""
    order = layer.spline_order
    low, high = layer.grid_bounds.unbind(-1)
    per_unit = layer.grid_size / (high - low)
    centres = torch.arange(layer.grid_size + order, dtype=x.dtype, device=x.device) - (order - 1) / 2
    offset = ((x - low) * per_unit).unsqueeze(-1) - centres
    # See `bspline_basis`, whose truncated powers the three share.
    room = (order + 1) / 2 - offset.abs()
    powers = [_falling_powers(room - m, order) for m in range(order // 2 + 1)]
    factors = spline_factors(order)
    values, slopes, bends = (sum(f * power[d] for f, power in zip(factors, powers, strict=True)) for d in range(3))
    per_unit = per_unit.unsqueeze(-1)
    slopes = slopes * -offset.sign() * per_unit
    bends = bends * per_unit.square()

    return tuple(
        torch.cat([part, extra.unsqueeze(-1)], dim=-1)
        for part, extra in zip((values, slopes, bends), silu_derivatives(x, 2), strict=True)
    )


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


def _by_hand(
    layer: nn.Module,
    weight: Tensor,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool,
) -> Parts:
    """Rows come last inside, where all operations run along them."""
    lead = z.shape[:-1]
    flat = [z.reshape(-1, z.shape[-1]).T]
    for part in (first, second):
        flat.append(None if part is None else part.expand(len(part), *z.shape).reshape(len(part), -1, z.shape[-1]).mT)
    shape = weight.shape

    def plain(z: Tensor, first: Tensor, second: Tensor | None, weight: Tensor) -> list[Tensor]:
        second = None if second is None else second.mT
        weight = weight.unflatten(1, (-1, shape[1])).transpose(1, 2)
        streams = _streams(layer, z.T, first.mT, second, weights)
        y = streams.flatten(-2) @ weight.flatten(1).T
        return [y[0].T, y[1 : 1 + len(first)].mT, y[1 + len(first) :].mT]

    coefficients = weight.transpose(1, 2).flatten(1)
    function = FewOutputsJet if few_outputs(layer, z) else LayerJet
    y = function.apply(*flat, coefficients, layer, weights, only_second, plain)
    return tuple(None if part is None else part.mT.unflatten(-2, lead) if len(lead) != 1 else part.mT for part in y)


# Coefficients in force


def own_layer(layer: nn.Module) -> nn.Module:
    """The KAN layer under its adapters."""
    while isinstance(layer._modules.get("base_layer"), nn.Module):
        layer = layer.base_layer
    return layer


def _coefficients(layer: nn.Module) -> tuple[nn.Module, Tensor | None, list[tuple]]:
    """
    The KAN layer under the adapters, its coefficients (O, I, K + 1), silu last, and the Tucker updates in force.

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
        return layer, None, [(1.0, *layer.components), *updates]
    spline_weight, base_weight = (sum(added[name], getattr(layer, name)) for name in ("spline_weight", "base_weight"))
    return layer, torch.cat([spline_weight, base_weight.unsqueeze(-1)], dim=-1), updates


def _contracts_cheaper(rows: int, o: int, i: int, k: int, ro: int, ri: int, rb: int) -> bool:
    """
    Whether contracting the factors row by row takes fewer multiplications than building the update.

    Forward and backward. In the first case three products for each one in the forward pass; in the second the tensor
    is built and differentiated, and gets a gradient from each row. One row at a time (`vmap`), the first always wins.
    """
    thin = i * k * rb + i * rb * ri + ri * rb * ro + ro * o
    return 3 * rows * thin < 3 * o * i * k * ro + rows * o * i * k


def _is_contracted(layer: nn.Module, rows: int) -> bool:
    own, _, updates = _coefficients(layer)
    shape = (own.out_features, own.in_features, own.grid_size + own.spline_order + 1)
    return any(_contracts_cheaper(rows, *shape, *update[1].shape) for update in updates)


def _dense(scale: float, core: Tensor, factor_out: Tensor, factor_in: Tensor, factor_basis: Tensor, size: int):
    """The update (O, I, size); without the residual branch its slice is zero."""
    from ..tucker import reconstruct

    update = scale * reconstruct(core, factor_out, factor_in, factor_basis)
    return nn.functional.pad(update, (0, size - len(factor_basis)))


def _contract(
    streams: Tensor, scale: float, core: Tensor, factor_out: Tensor, factor_in: Tensor, factor_basis: Tensor
) -> Tensor:
    """Features (..., I, K) times the update, by the smallest products, so that no gradient is larger than its factor
    (but for the row's features)."""
    t = streams[..., : len(factor_basis)] @ factor_basis  # (..., I, rb)
    t = factor_in.T @ t  # (..., ri, rb)
    return t.flatten(-2) @ core.flatten(1).T @ (scale * factor_out).T
