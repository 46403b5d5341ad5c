# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The B-splines on a uniform grid that are not zero at a point, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, cardinal_spline, silu_derivatives
from ..kan.memory import JET_BLOCK, JET_PART, OFF_CPU, workspace
from .bases import DenseFunctions, equal_blocks


class SplineFeatures:
    """The B-splines of a layer with inputs z (I, N), silu, and the derivatives of both.

    At a point only the p + 1 splines whose support holds it are evaluated, as polynomials in its distance from the
    start of its grid interval. Derivatives are in positions, whose unit is a grid interval.

    Attributes:
        shape: (K + 1, I).
        scale: Grid intervals per unit of the inputs, (I, 1); None where derivatives are in the inputs.
        rows: How many rows are evaluated at a time.
    """

    def __init__(self, grid: UniformGrid, z: Tensor, few_outputs: bool = False) -> None:
        self.grid, self.few_outputs = grid, few_outputs
        self.shape = (grid.num_basis + 1, len(z))
        self.scale = grid.per_unit.unsqueeze(-1)
        block, part = (JET_BLOCK, JET_PART) if z.device.type == "cpu" else (OFF_CPU, OFF_CPU)
        self.rows = max(128, block // ((grid.spline_order + 2) * len(z)))
        self.rows_of_part = self.rows if self.few_outputs else max(128, part // ((grid.num_basis + 2) * len(z)))

    def evaluate(self, z: Tensor, orders: Sequence[int]) -> list[Tensor]:
        """The derivatives of these orders at z (I, rows), each (p + 2, I, rows) with silu as the last function; and
        for each part of the rows the places of the splines in the memory of `LocalSplines`."""
        order = self.grid.spline_order
        powers = workspace("powers", z, order + 1, *z.shape)
        powers[0] = 1
        t, rows = grid_intervals(self.grid, self.scale, z, out=powers[1])  # rows of the first, in `LocalSplines.dense`
        for q in range(1, order):
            torch.mul(powers[q], t, out=powers[q + 1])
        pieces, silu = spline_pieces(order, z.dtype, z.device), silu_derivatives(z, max(orders))
        found = z.new_empty(len(orders), order + 2, *z.shape)
        for d, part in zip(orders, found, strict=True):
            torch.mm(pieces[d], powers.flatten(1), out=part[:-1].flatten(1))
            torch.div(silu[d], self.scale**d, out=part[-1]) if d else part[-1].copy_(silu[0])
        places = []
        for part in equal_blocks(z.shape[1], self.rows_of_part):
            width = 1 if self.few_outputs else part.stop - part.start
            start = torch.arange(len(z) * width, device=z.device).view(-1, width)
            first = start + rows[:, part] * start.numel()
            following = torch.arange(order + 1, device=z.device) * start.numel()
            places.append((first.flatten() + following.unsqueeze(-1)).flatten())
        return [*found, *places]

    def parts(self, z: Tensor, orders: Sequence[int], kept: Sequence[Tensor]) -> Iterator[tuple[slice, LocalSplines]]:
        """The functions for parts of the rows of z (I, N), from what `evaluate` gave for all rows and these orders, if
        that was kept."""
        for block in equal_blocks(z.shape[1], self.rows):
            functions = kept or self.evaluate(z[:, block], orders)
            parts = equal_blocks(block.stop - block.start, self.rows_of_part)
            for part, places in zip(parts, functions[len(orders) :], strict=True):
                here = {d: one[..., part] for d, one in zip(orders, functions, strict=False)}
                yield slice(block.start + part.start, block.start + part.stop), LocalSplines(self, here, places)


def grid_intervals(grid: UniformGrid, scale: Tensor, z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For z (I, N), the distance from the start of its grid interval, in intervals, and the number of that, which is
    that of the first spline there, counted from p + 1 of them before the grid. Beyond, where all are zero, it is the
    last; `scale` (I, 1) are the intervals per unit."""
    position = (z - grid.low.unsqueeze(-1)).mul_(scale)
    position.clamp_(-grid.spline_order - 1, grid.num_basis)
    start = position.floor()
    return torch.sub(position, start, out=out), start.nan_to_num_().long().add_(grid.spline_order + 1)


class LocalSplines(DenseFunctions):
    """The functions that are not zero, for a part of the rows, by order of the derivative (p + 2, I, R).

    For a matrix product they are put at their places among all functions.
    """

    def __init__(self, features: SplineFeatures, functions: dict[int, Tensor], places: Tensor) -> None:
        super().__init__(functions)
        self.places = places
        # All functions, and before and after them rows for splines that are not on the grid.
        self.outside, count = features.grid.spline_order + 1, features.shape[0]
        width = 1 if features.few_outputs else self.like.shape[-1]
        self.dense = workspace("dense", self.like, count + 2 * self.outside - 1, self.like.shape[1], width)
        self.all = self.dense[self.outside : self.outside + count]

    def matrices(self, rows: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Tensors (p + 2, I, R) as matrices ((K + 1) I, R), each with its number and to be used before the next."""
        self.all.zero_()
        flat, matrix = self.dense.view(-1), self.all.flatten(0, 1)
        for number, row in enumerate(rows):
            flat.scatter_(0, self.places, row[:-1].reshape(-1))
            self.all[-1].copy_(row[-1])
            yield number, matrix

    def sums(self, row: Tensor) -> Tensor:
        """The sums of a tensor (p + 2, I, R) over the points, ((K + 1) I,), with few outputs."""
        self.all.zero_()
        self.dense.view(-1).scatter_add_(0, self.places, row[:-1].reshape(-1))
        self.all[-1, :, 0] = row[-1].sum(-1)
        return self.all.flatten()

    def towards(self, transposed: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """The products of ((K + 1) I, O) and (O, R) at the places of the functions: (S, p + 2, I, R)."""
        found = self.memory("towards", len(gradients))
        self.dense[: self.outside].zero_()
        self.dense[self.outside + len(self.all) :].zero_()
        flat, matrix, silu = self.dense.view(-1), self.all.flatten(0, 1), self.all[-1]
        for one, gradient in zip(found, gradients, strict=True):
            torch.mm(transposed, gradient, out=matrix)
            one[-1].copy_(silu)
            silu.zero_()
            torch.index_select(flat, 0, self.places, out=one[:-1].view(-1))
        return found


@lru_cache(maxsize=64)
def spline_pieces(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The B-splines in a grid interval as polynomials in the distance from the start of the interval, and their
    first five derivatives: (6, p + 1, p + 1), powers ascending, the spline that begins first in row 0."""
    with torch.inference_mode(False):
        start = (order - 1) / 2 - torch.arange(order + 1, dtype=torch.float64, device="cpu")
        points = [start] * order + [start + 0.5]  # the last derivative jumps at the start
        derivatives = [
            torch.stack([cardinal_spline(x, order, q) / math.factorial(q) for q, x in enumerate(points)], -1)
        ]
        for _ in range(5):
            lower = derivatives[-1] * torch.arange(order + 1, dtype=torch.float64, device="cpu")
            derivatives.append(torch.nn.functional.pad(lower[:, 1:], (0, 1)))
        return torch.stack(derivatives).to(device, dtype)
