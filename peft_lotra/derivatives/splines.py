# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The B-splines on a uniform grid that are not zero at a point, with their derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..kan.basis import UniformGrid, silu_derivatives, spline_pieces
from ..kan.memory import workspace
from .bases import FunctionFeatures


class SplineFeatures(FunctionFeatures):
    """The B-splines of degree p of a layer with inputs z (I, N), silu, and the derivatives of both.

    At a point only the p + 1 splines whose support contains it are evaluated, as polynomials in its distance from the
    start of its grid interval. Derivatives are in positions, whose unit is a grid interval. For a matrix product the
    splines are put at their indices among all functions.
    """

    scale: Tensor

    def __init__(self, grid: UniformGrid, z: Tensor) -> None:
        super().__init__(grid, z)
        self.scale = grid.per_unit.unsqueeze(-1)
        self.margin = grid.spline_order + 1  # splines before and after the grid

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """Return the p + 1 splines and silu at z (I, R) and their derivatives, each (p + 2, I, R).

        The last entry has the indices of the splines in the memory of all functions.
        """
        degree = self.basis.spline_order
        position = (z - self.basis.low.unsqueeze(-1)).mul_(self.scale)
        position.clamp_(-self.margin, self.basis.num_basis)  # beyond, all splines are zero
        start = position.floor()
        powers = workspace("powers", z, degree + 1, *z.shape)
        powers[0] = 1
        torch.sub(position, start, out=powers[1])
        for q in range(1, degree):
            torch.mul(powers[q], powers[1], out=powers[q + 1])

        pieces = spline_pieces(degree, z.dtype, z.device)
        silu = silu_derivatives(z, highest)
        matrix = powers.flatten(1)
        values = z.new_empty(highest + 1, degree + 2, *z.shape)
        for order, value in enumerate(values):
            splines = value[:-1].flatten(1)
            torch.mm(pieces[order], matrix, out=splines)
            if order == 0:
                value[-1].copy_(silu[0])
            else:
                torch.div(silu[order], self.scale**order, out=value[-1])

        # the indices in memory of shape (splines with margins, I, R)
        count = z.numel()
        first = start.nan_to_num_().long().add_(self.margin)
        first = first.mul_(count).flatten()
        first.add_(torch.arange(count, device=z.device))
        steps = count * torch.arange(degree + 1, device=z.device)
        indices = first + steps.unsqueeze(-1)
        return [*values, indices.flatten()]

    @property
    def indices(self) -> Tensor:
        """The indices of the splines in the memory of all functions."""
        return self.functions[-1]

    def _dense(self) -> tuple[Tensor, Tensor]:
        """Return memory for all functions with margins of splines outside of the grid, and the view without them."""
        count = self.shape[0]
        like = self.functions[0]
        total = count + 2 * self.margin - 1
        dense = workspace("dense", like, total, *like.shape[1:])
        return dense, dense[self.margin : self.margin + count]

    def matrices(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield tensors (p + 2, I, R) as matrices ((K + 1) I, R), each to be used before the next."""
        dense, functions = self._dense()
        functions.zero_()
        flat = dense.view(-1)
        for row in rows:
            splines = row[:-1].reshape(-1)
            flat.scatter_(0, self.indices, splines)
            functions[-1].copy_(row[-1])
            yield functions.flatten(0, 1)

    def pull_back(self, transposed: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Return the products of ((K + 1) I, O) and each gradient (O, R) at the indices, (S, p + 2, I, R)."""
        products = self.memory("pull_back", len(gradients))
        dense, functions = self._dense()
        dense[: self.margin].zero_()
        dense[self.margin + len(functions) :].zero_()
        flat = dense.view(-1)
        for product, gradient in zip(products, gradients, strict=True):
            torch.mm(transposed, gradient, out=functions.flatten(0, 1))
            silu = functions[-1]
            product[-1].copy_(silu)
            # its memory is in the margin of the splines, which must be zero
            silu.zero_()
            splines = product[:-1].view(-1)
            torch.index_select(flat, 0, self.indices, out=splines)
        return products
