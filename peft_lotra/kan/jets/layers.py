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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...tucker import Update
from ..basis import UniformGrid, silu_derivatives, spline_factors
from ..product import needs_plain_operations
from .by_hand import JetRows, LayerFeatures, LayerJet
from .chain import Stage
from .few_outputs import FewOutputsJet, few_outputs


# Numbers in the largest tensor of a block of rows, where layers are applied by plain operations. Larger blocks leave
# the cache, and the allocator asks the system for fresh pages each time.
BLOCK = 2**18

# Up to so many outputs, the matrix product of `LayerJet` costs less than the plain operations on an update in factored
# form, where no factor gets a gradient.
MOST_OUTPUTS_DENSE = 1024


class Jet(NamedTuple):
    """
    A value with its first and second derivatives along D directions.

    Attributes:
        value: (..., O); None where the second derivatives alone are wanted.
        first: (D, ..., O); None as `value`.
        second: (D, ..., O), or (1, ..., O) for their weighted sum; (..., O) for that of a network.
    """

    value: Tensor
    first: Tensor
    second: Tensor

    @property
    def parts(self) -> list[Tensor]:
        """Those that are not None."""
        return [part for part in self if part is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Jet:
        """`function` of each part that is not None."""
        parts: list[Any] = [None if part is None else function(part) for part in self]
        return Jet(*parts)


def block_size(x: Tensor, stages: list[Stage], directions: int) -> int | None:
    """The number of rows of x (N, I) to take at a time; None for all."""
    if x.device.type != "cpu" or x.dim() != 2 or not _by_hand_pays(len(x), x):
        return None
    rows, shapes = len(x) * (2 + directions), [(stage, stage.shape) for stage in stages if not stage.is_norm]
    if not any(_is_contracted(rows, shape, update, True) for stage, shape in shapes for update in stage.updates):
        return None  # `LayerJet` takes blocks itself
    widest = max(inputs * basis for _, (_, inputs, basis) in shapes)
    size = max(128, BLOCK // (widest * (2 + directions)))
    return None if size >= len(x) else -(-len(x) // -(-len(x) // size))  # blocks of about equal size


def evaluate_layer(
    stage: Stage, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None, only_second: bool = False
) -> Jet:
    """
    Takes the jet (z, z', z'') of a KAN layer's inputs to that of its outputs.

    Args:
        stage: the layer, with the coefficients in force.
        z: values, shape (..., I).
        first: derivatives along D directions, (D, ..., I), where (...) may be ones.
        second: second derivatives, (D, ..., I), or (1, ..., I) with `weights`; None if they are zero.
        weights: (D,), to return the weighted sum of the second derivatives alone; None to return each of them.
        only_second: whether value and first derivatives may be None in the result.
    """
    grid, shape, dense = stage.grid, stage.shape, stage.dense
    weight = None if dense is None else torch.cat([dense[0], dense[1].unsqueeze(-1)], dim=-1)
    count = len(first)
    rows = z[..., 0].numel() * (1 + count + (count if weights is None else 1))
    # `LayerJet` takes weights and grids for constants
    by_hand = not any(part is not None and part.requires_grad for part in (weights, stage.layer.grid_bounds))
    by_hand = by_hand and _by_hand_pays(rows, z, first, second, *(dense or ()))
    factored = []
    for update in stage.updates:
        if _is_contracted(rows, shape, update, by_hand):
            factored.append(update)
        else:
            delta = _dense(update, shape[-1])
            weight = delta if weight is None else weight + delta

    by_hand = by_hand and not factored and not needs_plain_operations(z, weight)
    lead = z.shape[:-1]
    z = z.reshape(-1, shape[1]).T  # rows come last from here on, where all operations run along them
    first = _rows_last(first, lead)
    second = None if second is None else _rows_last(second, lead)
    weight = None if weight is None else weight.transpose(1, 2).flatten(1)  # (O, (K + 1) I)
    if by_hand:
        function = FewOutputsJet if few_outputs(stage.layer, z) else LayerJet
        first = first.expand(len(first), *z.shape)
        second = None if second is None else second.expand(len(second), *z.shape)
        plain = partial(_by_plain_operations, grid, [], weights, False)
        y = Jet(*function.apply(z, first, second, weight, grid, weights, only_second, plain))
    else:
        y = _by_plain_operations(grid, factored, weights, only_second, z, first, second, weight)
    return y.map(lambda part: part.mT.reshape(*part.shape[:-2], *lead, shape[0]))


def _rows_last(part: Tensor, lead: torch.Size) -> Tensor:
    """(D, ..., I), where (...) may be ones, to (D, I, N) or (D, I, 1)."""
    rows = part.shape[1:-1].numel()
    if rows > 1:
        part, rows = part.expand(len(part), *lead, part.shape[-1]), lead.numel()
    return part.reshape(len(part), rows, part.shape[-1]).mT


def contract_updates(layer: Any, updates: list[Update], x: Tensor) -> Tensor:
    """What updates add to the output of a KAN layer, (..., O)."""
    features = torch.cat([layer.basis(x), nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    features = features.reshape(1, -1, *features.shape[-2:]).permute(0, 3, 2, 1)
    parts = [_contract(features, update)[0].T for update in updates]
    return sum(parts[1:], parts[0]).reshape(*x.shape[:-1], -1) if parts else x.new_zeros(())


# By operations that autograd differentiates


def _by_plain_operations(
    grid: UniformGrid,
    factored: Sequence[Update],
    weights: Tensor | None,
    only_second: bool,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
) -> Jet:
    """As `LayerJet`, but `weight` may be None, and updates in factored form are added."""
    rows = _jet_rows(grid, z, first, second, weights, only_second)
    if torch.compiler.is_compiling() and weight is not None and not factored:
        # a product for each, so that the rows need not be written into one tensor
        y = torch.stack([weight @ row.flatten(0, 1) for row in rows])
    else:
        stacked = torch.stack(rows)
        y: Any = 0 if weight is None else weight @ stacked.flatten(1, 2)
        y = sum((_contract(stacked, update) for update in factored), y)
    if only_second:
        return Jet(None, None, y)  # pyright: ignore[reportArgumentType]  (see `Jet`)
    return Jet(y[0], y[1 : 1 + len(first)], y[1 + len(first) :])


def _jet_rows(
    grid: UniformGrid,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool = False,
) -> list[Tensor]:
    """What multiplies the coefficients: f, f' z' and f'' z'^2 + f' z'' for the basis functions f, which are
    1 + D + (D or 1) tensors (K + 1, I, N), or the last of these alone."""
    f, df, d2f = _features(grid, z)
    square = first.square()
    if weights is not None:
        square = torch.tensordot(weights, square, 1).unsqueeze(0)
    of_second = [d2f * part for part in square]
    if second is not None:
        of_second = [one + df * part for one, part in zip(of_second, second, strict=True)]
    return of_second if only_second else [f, *(df * part for part in first), *of_second]


def _features(grid: UniformGrid, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The B-splines of a grid at z (I, N) with silu as the last one, (K + 1, I, N), and their first and second
    derivatives."""
    order = grid.spline_order
    low, high = grid.low.unsqueeze(-1), grid.high.unsqueeze(-1)
    per_unit = grid.grid_size / (high - low)
    centers = torch.arange(grid.grid_size + order, dtype=z.dtype, device=z.device) - (order - 1) / 2
    offset = (z - low) * per_unit - centers[:, None, None]
    # See `bspline_basis`, whose truncated powers the three share.
    distance = (order + 1) / 2 - offset.abs()
    powers = [_falling_powers(distance - m, order) for m in range(order // 2 + 1)]
    factors = spline_factors(order)
    parts: list[Any] = [sum(f * power[d] for f, power in zip(factors, powers, strict=True)) for d in range(3)]
    values, first, second = parts[0], parts[1] * -offset.sign() * per_unit, parts[2] * per_unit.square()
    pairs = zip((values, first, second), silu_derivatives(z, 2), strict=True)
    f, df, d2f = (torch.cat([part, extra.unsqueeze(0)]) for part, extra in pairs)
    return f, df, d2f


def _falling_powers(distance: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """max(distance, 0)^p / p! and its first two derivatives, p being the order."""
    positive = torch.relu(distance)
    powers = [torch.zeros_like(distance), (distance > 0).to(distance.dtype), positive]  # p = -1, 0, 1
    for p in range(2, order + 1):
        powers.append(powers[-1] * positive / p)
    return powers[order + 1], powers[order], powers[order - 1]


# By hand: the same numbers, a fraction of the passes over memory


def _by_hand_pays(rows: int, x: Tensor, *others: Tensor | None) -> bool:
    """Not for a few rows, and not in transforms or compiled, which need plain operations."""
    return rows > 64 and not needs_plain_operations(x, *others)


@torch.no_grad()
def jet_rows(
    grid: UniformGrid,
    z: Tensor,
    first: Tensor,
    second: Tensor | None,
    weights: Tensor | None,
    only_second: bool,
    evaluated: int,
) -> Tensor:
    """
    What multiplies the coefficients of a layer for each of the points z (N, I), arguments as for `evaluate_layer`.

    Args:
        evaluated: the number of points that the layer was evaluated at. The second derivative of quadratic splines
            jumps at the knots, and there the result must be that of the same operations.

    Returns:
        Tensor (N, S, K + 1, I) with S = 1 + D + (D or 1), or the last of these alone.
    """
    z, first, second = z.T, first.expand(len(first), *z.shape).mT, None if second is None else second.mT
    count = len(first)
    seconds = count if weights is None else 1
    if grid.spline_order < 3 and not _by_hand_pays(evaluated * (1 + count + seconds), z):
        return torch.stack(_jet_rows(grid, z, first, second, weights, only_second)).permute(3, 0, 1, 2)
    block = LayerFeatures(grid, z)
    rows = z.new_empty(z.shape[1], seconds if only_second else 1 + count + seconds, *block.shape)
    for part in block.blocks(z.shape[1]):
        derivatives = range(1 if only_second else 0, 3 if count else 1)
        streams = JetRows(block, part, z, first, second, weights, derivatives)
        found = [] if only_second else [streams.value, *(partial(streams.first, d) for d in range(count))]
        found += [partial(streams.second, d) for d in range(seconds)]
        for index, row in enumerate(found):
            rows[part, index].flatten(1).copy_(row().T)
    return rows


# Updates, in factored form or dense


def _contracts_cheaper(rows: int, o: int, i: int, k: int, ro: int, ri: int, rb: int) -> bool:
    """
    Whether contracting the factors row by row takes fewer multiplications, forward and backward, than building the
    update.

    A contraction costs three products for each one of the forward pass. Otherwise the tensor is built, differentiated,
    and gets a gradient from each row. One row at a time (`vmap`), contraction always wins.
    """
    thin = i * k * rb + i * rb * ri + ri * rb * ro + ro * o
    return 3 * rows * thin < 3 * o * i * k * ro + rows * o * i * k


def _is_contracted(rows: int, shape: tuple[int, int, int], update: Update, by_hand: bool) -> bool:
    """Whether an update stays in factored form; `by_hand` is whether `LayerJet` can be taken."""
    trained = torch.is_grad_enabled() and any(part.requires_grad for part in update.tensor)
    if by_hand and not trained and shape[0] <= MOST_OUTPUTS_DENSE:
        return False
    return _contracts_cheaper(rows, *shape, *update.tensor.ranks)


def _dense(update: Update, size: int) -> Tensor:
    """The update (O, I, size); without the residual branch its slice is zero."""
    dense = update.dense()
    return nn.functional.pad(dense, (0, size - dense.shape[-1]))


def _contract(rows: Tensor, update: Update) -> Tensor:
    """Jet rows (S, K + 1, I, N) times the update, (S, O, N), by the smallest products: no gradient but that of the
    rows is larger than its factor."""
    core, factor_out, factor_in, factor_basis = update.tensor
    t = factor_basis.T @ rows[:, : len(factor_basis)].flatten(2)  # (S, rb, I N)
    t = factor_in.T @ t.unflatten(2, rows.shape[2:])  # (S, rb, ri, N)
    return (update.scale * factor_out) @ (core.transpose(1, 2).flatten(1) @ t.flatten(1, 2))
