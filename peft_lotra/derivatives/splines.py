# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The B-splines on a uniform grid that are not zero at a point, with their derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, silu_derivatives, spline_pieces
from ..kan.memory import workspace
from .bases import DenseFunctions, FunctionFeatures


class SplineFeatures(FunctionFeatures):
    """The B-splines of a layer with inputs z (I, N), silu, and the derivatives of both.

    At a point only the p + 1 splines whose support holds it are evaluated, as polynomials in its distance from the
    start of its grid interval. Derivatives are in positions, whose unit is a grid interval.
    """

    scale: Tensor

    def __init__(self, grid: UniformGrid, z: Tensor) -> None:
        super().__init__(grid, z)
        self.scale = grid.per_unit.unsqueeze(-1)

    def evaluate(self, z: Tensor, orders: Sequence[int]) -> list[Tensor]:
        """The derivatives of these orders at z (I, rows), each (p + 2, I, rows) with silu as the last function; and
        the places of the splines in the memory of `LocalSplines`."""
        order = self.basis.spline_order
        position = (z - self.basis.low.unsqueeze(-1)).mul_(self.scale)
        position.clamp_(-order - 1, self.basis.num_basis)  # beyond, all splines are zero
        start = position.floor()
        powers = workspace("powers", z, order + 1, *z.shape)
        powers[0] = 1
        torch.sub(position, start, out=powers[1])
        for q in range(1, order):
            torch.mul(powers[q], powers[1], out=powers[q + 1])
        pieces, silu = spline_pieces(order, z.dtype, z.device), silu_derivatives(z, max(orders))
        found = z.new_empty(len(orders), order + 2, *z.shape)
        for d, part in zip(orders, found, strict=True):
            torch.mm(pieces[d], powers.flatten(1), out=part[:-1].flatten(1))
            torch.div(silu[d], self.scale**d, out=part[-1]) if d else part[-1].copy_(silu[0])
        first = start.nan_to_num_().long().add_(order + 1).mul_(z.numel()).flatten()
        first += torch.arange(z.numel(), device=z.device)
        places = first + z.numel() * torch.arange(order + 1, device=z.device).unsqueeze(-1)
        return [*found, places.flatten()]

    def functions(self, orders: Sequence[int], found: Sequence[Tensor]) -> LocalSplines:
        """The functions of a block, from the results of `evaluate`."""
        return LocalSplines(self, dict(zip(orders, found, strict=False)), found[-1])


class LocalSplines(DenseFunctions):
    """The functions that are not zero, for a part of the rows, by order of the derivative (p + 2, I, R).

    For a matrix product they are put at their places among all functions.
    """

    def __init__(self, features: SplineFeatures, functions: dict[int, Tensor], places: Tensor) -> None:
        super().__init__(functions)
        self.places = places
        # All functions, and before and after them rows for splines that are not on the grid.
        self.outside, count = features.basis.spline_order + 1, features.shape[0]
        self.dense = workspace("dense", self.like, count + 2 * self.outside - 1, *self.like.shape[1:])
        self.all = self.dense[self.outside : self.outside + count]

    def matrices(self, rows: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Tensors (p + 2, I, R) as matrices ((K + 1) I, R), each with its number and to be used before the next."""
        self.all.zero_()
        flat, matrix = self.dense.view(-1), self.all.flatten(0, 1)
        for number, row in enumerate(rows):
            flat.scatter_(0, self.places, row[:-1].reshape(-1))
            self.all[-1].copy_(row[-1])
            yield number, matrix

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
