# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The functions on the edges of a layer with few outputs, phi[o, i] and three derivatives, and the gradient of its
coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kan.basis import UniformGrid, silu_derivatives
from .bases import FunctionBasis
from .splines import grid_intervals, spline_pieces


class SplineEdges(NamedTuple):
    """Splines on a uniform grid, and silu. An edge is a polynomial in each grid interval, whose coefficients are
    gathered for each point, so that nothing has the size of the basis. The gradient of the coefficients comes from
    sums of moments by interval."""

    order: int
    num_basis: int

    @property
    def intervals(self) -> int:
        """Those of the grid, and those beside it to which points beyond it are moved."""
        return self.num_basis + self.order + 3

    def evaluate(self, grid: UniformGrid, z: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """phi and three derivatives at z (I, N), each (O, I, N), for coefficients (O, (K + 1) I); and what `gradient`
        needs."""
        order, inputs, intervals = self.order, len(z), self.intervals
        scale = grid.per_unit.unsqueeze(-1)
        t, index = grid_intervals(grid, scale, z)
        index = index.add_(torch.arange(0, inputs * intervals, intervals, device=z.device).unsqueeze(-1)).flatten()

        splines, base = weight.view(len(weight), -1, inputs).transpose(1, 2).split([self.num_basis, 1], -1)
        windows = nn.functional.pad(splines, (order + 1, order + 2)).unfold(-1, order + 1, 1)
        pieces = spline_pieces(order, z.dtype, z.device)[0]
        table = (pieces.T @ windows.permute(3, 0, 1, 2).flatten(1)).view(-1, inputs * intervals)
        gathered = table.index_select(1, index).view(order + 1, -1, *z.shape)

        silu = silu_derivatives(z, 3)
        value, *derivatives = taylor(gathered, t, 3)
        derivatives = [part * (math.factorial(d) * scale**d) for d, part in enumerate(derivatives, 1)]
        phi = [torch.addcmul(part, base, extra) for part, extra in zip([value, *derivatives], silu, strict=True)]
        return phi, [scale, t, index, *silu[:3]]

    def gradient(self, kept: Sequence[Tensor], towards: Sequence[Tensor]) -> Tensor:
        """(O, (K + 1) I), from those towards phi and its first two derivatives, (O, I, N)."""
        scale, t, index, *silu = kept
        to_base = (towards[0] * silu[0]).addcmul_(towards[1], silu[1]).addcmul_(towards[2], silu[2])
        outputs, inputs = to_base.shape[:2]
        moments = t.new_empty(self.order + 1, *to_base.shape)  # sum_d towards[d] (t^q)^(d), each from the one before
        moments[0] = towards[0]
        of_first, of_second = towards[1] * scale, towards[2] * (2 * scale**2)
        for q in range(1, self.order + 1):
            torch.addcmul(of_first, moments[q - 1], t, out=moments[q])
            if q < self.order:
                of_first, of_second = torch.addcmul(of_second, of_first, t), of_second * t
        sums = t.new_zeros((self.order + 1) * outputs, inputs * self.intervals)
        sums = sums.index_add_(1, index, moments.view(len(sums), -1)).view(self.order + 1, -1)
        windows = (spline_pieces(self.order, t.dtype, t.device)[0] @ sums).view(-1, outputs, inputs, self.intervals)
        # entry l of the window of interval j, counted from -order - 1, is basis function j + l
        shifted = [window[..., self.order + 1 - m :][..., : self.num_basis] for m, window in enumerate(windows)]
        found = torch.cat([sum(shifted[1:], shifted[0]), to_base.sum(-1, keepdim=True)], dim=-1)
        return found.transpose(1, 2).flatten(1)


class FunctionEdges(NamedTuple):
    """Functions of any kind, each edge the sum of all of them."""

    size: int

    def evaluate(self, basis: FunctionBasis, z: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As that of `SplineEdges`, for coefficients (O, K I)."""
        functions = [part.transpose(0, 1) for part in basis.evaluate(z, 3)]  # (I, K, N)
        by_input = weight.view(len(weight), self.size, len(z)).permute(2, 0, 1)
        return [torch.bmm(by_input, part).transpose(0, 1) for part in functions], functions[:3]

    def gradient(self, kept: Sequence[Tensor], towards: Sequence[Tensor]) -> Tensor:
        """As that of `SplineEdges`, (O, K I)."""
        found = sum(torch.bmm(to.transpose(0, 1), part.mT) for to, part in zip(towards, kept, strict=True))
        return found.permute(1, 2, 0).flatten(1)  # pyright: ignore[reportAttributeAccessIssue] (a sum of tensors)


def taylor(coefficients: Tensor, t: Tensor, highest: int) -> list[Tensor]:
    """The coefficients of s^0 ... s^highest of a polynomial in t + s, from those of its powers, (p + 1, ...), by
    repeated division by Horner's scheme: its derivatives at t, each divided by the factorial of its order."""
    found: list[Tensor] = []
    parts = list(coefficients)
    for _ in range(highest + 1):
        for power in range(len(parts) - 2, -1, -1):
            parts[power] = torch.addcmul(parts[power], parts[power + 1], t)
        found.append(parts.pop(0))
    return found
