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

from .basis import in_transform, spline_factors


# Numbers in the largest tensor of a block of rows. Larger blocks leave the cache, and the allocator asks the system
# for fresh pages each time: 2000 points through [2, 16, 16, 1] took 22 ms at once and 11 ms in blocks.
BLOCK = 2**18


def block_size(x: Tensor, layers: list[nn.Module], directions: int) -> int | None:
    """How many rows of x (N, I) to take at a time; None for all."""
    if x.device.type != "cpu" or x.dim() != 2 or not _by_hand_pays(len(x)):
        return None
    widest = max(own.in_features * (own.grid_size + own.spline_order + 1) for own in map(own_layer, layers))
    size = max(128, BLOCK // (widest * (2 + directions)))
    return None if size >= len(x) else -(-len(x) // -(-len(x) // size))  # blocks of about equal size


def through_layer(
    layer: nn.Module, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    (z, z', z'') to (y, y', y'') of the layer's output.

    Args:
        layer: a KAN layer, with the adapters that PEFT put around it.
        z: values, shape (..., I).
        first: derivatives along D directions, (D, ..., I), where (...) may be ones.
        second: second derivatives, (D, ..., I), or (1, ..., I) with `weights`; None if they are zero.
        weights: of the sum of the second derivatives that alone is wanted, (D,); None for each.

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

    if not factored and _by_hand_pays(rows):
        y = _by_hand(own, weight, z, first, second, weights)
    else:
        streams = _streams(own, z, first, second, weights)
        parts = [_contract(streams, *update) for update in factored]
        if weight is not None:
            parts.insert(0, streams.flatten(-2) @ weight.flatten(1).T)
        y = sum(parts[1:], parts[0])
    return y[0], y[1 : 1 + count], y[1 + count :]


def contract_updates(layer: nn.Module, updates: list[tuple], x: Tensor) -> Tensor:
    """What updates (scale, core, factor_out, factor_in, factor_basis) add to the output of a KAN layer, (..., O)."""
    features = torch.cat([layer.basis(x), nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    parts = [_contract(features, *update) for update in updates]
    return sum(parts[1:], parts[0]) if parts else x.new_zeros(())


# By operations that autograd differentiates


def _streams(layer: nn.Module, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None) -> Tensor:
    """What multiplies the coefficients: (1 + D + (D or 1), ..., I, K + 1)."""
    f, df, d2f = _features(layer, z)
    square = first.square()
    if weights is not None:
        square = torch.tensordot(weights, square, 1).unsqueeze(0)
    bent = d2f * square.unsqueeze(-1)
    if second is not None:
        bent = bent + df * second.unsqueeze(-1)
    return torch.cat([f.unsqueeze(0), df * first.unsqueeze(-1), bent])


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

    gate = torch.sigmoid(x)
    rest = 1 - gate
    silu = (x * gate, gate * (1 + x * rest), gate * rest * (2 + x * (rest - gate)))
    return tuple(
        torch.cat([part, extra.unsqueeze(-1)], dim=-1)
        for part, extra in zip((values, slopes, bends), silu, strict=True)
    )


def _falling_powers(room: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """max(room, 0)^p / p! and its first two derivatives in `room`, p being the order."""
    positive = torch.relu(room)
    powers = [torch.zeros_like(room), (room > 0).to(room.dtype), positive]  # p = -1, 0, 1
    for p in range(2, order + 1):
        powers.append(powers[-1] * positive / p)
    return powers[order + 1], powers[order], powers[order - 1]


# By hand: the same numbers, a fraction of the passes over memory


def _by_hand_pays(rows: int) -> bool:
    """Not inside transforms, which would have to be taught, nor compiled, which fuses the plain operations better."""
    return rows > 64 and not torch.compiler.is_compiling() and not in_transform()


def _by_hand(
    layer: nn.Module, weight: Tensor, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None
) -> Tensor:
    """(streams, ..., O). Rows come last inside, where all operations run along them."""
    lead = z.shape[:-1]
    first = first.expand(len(first), *z.shape)
    flat = (
        z.reshape(-1, z.shape[-1]).T,
        *(
            None if part is None else part.reshape(len(part), -1, part.shape[-1]).permute(2, 0, 1)
            for part in (first, second)
        ),
    )
    y = _LayerByHand.apply(*flat, weight.transpose(1, 2).flatten(1), layer, weights)
    return y.permute(1, 2, 0).unflatten(1, lead) if len(lead) != 1 else y.permute(1, 2, 0)


class _LayerByHand(torch.autograd.Function):
    """
    z (I, N), z' (I, D, N), z'' (I, D or 1, N) and coefficients (O, (K + 1) I) to y (O, streams, N).

    With S the streams of `_streams` as ((K + 1), I, streams, N), y = A S. The gradient g of S meets the basis and its
    first three derivatives in sums over k alone, which is what backward computes. It can be differentiated again: then
    it runs through the plain operations.
    """

    @staticmethod
    def forward(ctx, z, first, second, weight, layer, weights):
        with torch.no_grad():
            f, df, d2f, d3f = _features_by_hand(layer, z, third=any(ctx.needs_input_grad[:3]))
            count = first.shape[1]
            square = first.square()
            if weights is not None:
                square = torch.einsum("d,idn->in", weights, square).unsqueeze(1)
            streams = f.new_empty(*f.shape[:2], 1 + count + square.shape[1], f.shape[-1])
            streams[:, :, 0] = f
            torch.mul(df.unsqueeze(2), first, out=streams[:, :, 1 : 1 + count])
            bent = torch.mul(d2f.unsqueeze(2), square, out=streams[:, :, 1 + count :])
            if second is not None:
                bent.addcmul_(df.unsqueeze(2), second)
            y = weight @ streams.flatten(2).flatten(0, 1)
        ctx.save_for_backward(z, first, second, weight, weights)
        ctx.layer, ctx.kept = layer, (streams, square, df, d2f, d3f)
        return y.unflatten(1, streams.shape[2:])

    @staticmethod
    def backward(ctx, grad):
        z, first, second, weight, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_plain_gradients(ctx, grad), None, None
        streams, square, df, d2f, d3f = ctx.kept
        count = first.shape[1]
        grad = grad.flatten(1)
        grad_z = grad_first = grad_second = grad_weight = None
        if ctx.needs_input_grad[3]:
            grad_weight = grad @ streams.flatten(2).flatten(0, 1).T
        if any(ctx.needs_input_grad[:3]):
            g = (weight.T @ grad).view(streams.shape)
            with_df = (g * df.unsqueeze(2)).sum(0)  # (I, streams, N)
            with_d2f = (g[:, :, 1:] * d2f.unsqueeze(2)).sum(0)
            with_d3f = (g[:, :, 1 + count :] * d3f.unsqueeze(2)).sum(0)
            bent_d2f = with_d2f[:, count:]
            grad_z = with_df[:, 0] + (first * with_d2f[:, :count]).sum(1) + (square * with_d3f).sum(1)
            grad_first = 2 * first * bent_d2f
            if weights is not None:
                grad_first = grad_first * weights[:, None]
            grad_first += with_df[:, 1 : 1 + count]
            if second is not None:
                grad_second = with_df[:, 1 + count :]
                grad_z = grad_z + (second * bent_d2f).sum(1)
        return grad_z, grad_first, grad_second, grad_weight, None, None


def _plain_gradients(ctx, grad: Tensor) -> list[Tensor | None]:
    """The gradients as differentiable functions of the inputs and of `grad`."""
    *inputs, weights = ctx.saved_tensors
    z, first, second, weight = inputs
    parts = [None if part is None else part.permute(1, 2, 0) for part in (first, second)]
    streams = _streams(ctx.layer, z.T, *parts, weights)  # (streams, N, I, K + 1)
    y = torch.einsum("tnik,oki->otn", streams, weight.unflatten(1, (-1, z.shape[0])))
    wanted = [part for part, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _features_by_hand(layer: nn.Module, z: Tensor, third: bool) -> tuple[Tensor, ...]:
    """As `_features`, (K + 1, I, N), and the third derivatives if they are wanted."""
    order, size = layer.spline_order, layer.grid_size + layer.spline_order
    low, high = layer.grid_bounds.unsqueeze(-1).unbind(1)  # (I, 1)
    per_unit = layer.grid_size / (high - low)
    centres = torch.arange(size, dtype=z.dtype, device=z.device) - (order - 1) / 2
    parts = [z.new_empty(size + 1, *z.shape) for _ in range(4 if third else 3)]
    offset = ((z - low) * per_unit) - centres[:, None, None]
    distance = offset.abs()
    for m, factor in enumerate(spline_factors(order)):
        room = (order + 1) / 2 - m - distance
        power = (room > 0).to(z.dtype)  # max(room, 0)^0
        room.relu_()
        for p in range(order + 1):
            d = order - p
            if d < len(parts):
                target = parts[d][:-1]
                torch.mul(power, factor, out=target) if m == 0 else target.add_(power, alpha=factor)
            power = power * room / (p + 1) if p else room.clone()
    for d, part in enumerate(parts):
        if d > order:
            part[:-1] = 0
        elif d % 2:
            part[:-1].mul_(offset.sign().mul_(-(per_unit**d)))
        elif d:
            part[:-1].mul_(per_unit**d)

    gate = torch.sigmoid(z)
    slope = gate * (1 - gate)  # and those of the gate itself: slope', slope''
    bend = slope * (1 - 2 * gate)
    parts[0][-1] = z * gate
    parts[1][-1] = gate + z * slope
    parts[2][-1] = 2 * slope + z * bend
    if third:
        parts[3][-1] = 3 * bend + z * (slope * (1 - 6 * slope))
    return (*parts, None)[:4]


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
