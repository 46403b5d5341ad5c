# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Products of basis functions with coefficients of which each row has a low-rank update of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tucker import Update
from .basis import UniformGrid, bspline_basis
from .memory import blocks, workspace
from .product import Evaluator, block_sizes, needs_plain_operations
from .sparse_product import Points


# Fewest rows of a block: each takes about ten calls of torch. `examples/studies/benchmarks/bank.py`
_MIN_ROWS = 256


class PackedTucker(NamedTuple):
    """How Tucker tensors are packed into the rows of a matrix: the core and the factors one behind another.

    The modes of the core are reversed, and factor_out is transposed, which is how a product takes them fastest.

    Attributes:
        shape: (O, I, K) or with a kernel (O, I, K, P), K with the residual branch where there is one.
        ranks: (ro, ri, rb [, rk]); tensors of lower ranks are filled with zeros.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    # no properties: compiled code does not know them of tuples
    def component_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of core, factor_out, factor_in and factor_basis, then that of factor_kernel if there is one."""
        return [self.ranks, *zip(self.shape, self.ranks, strict=True)]

    def width(self) -> int:
        """The numbers of a row."""
        return sum([math.prod(shape) for shape in self.component_shapes()])

    def unpack(self, rows: Tensor) -> list[Tensor]:
        """The components of each row (R, width), as views (R, ...)."""
        shapes = self.component_shapes()
        parts = rows.split([math.prod(shape) for shape in shapes], dim=1)
        core = parts[0].unflatten(1, self.ranks[::-1]).permute(0, *range(len(self.ranks), 0, -1))
        factor_out = parts[1].unflatten(1, shapes[1][::-1]).transpose(1, 2)
        factors = [part.unflatten(1, shape) for part, shape in zip(parts[2:], shapes[2:], strict=True)]
        return [core, factor_out, *factors]

    def pack(self, updates: Sequence[Update | None], like: Tensor) -> Tensor:
        """The matrix (len(updates), width) of these updates, None for zero, in the dtype of `like`.

        They have these ranks or lower ones, and perhaps no residual branch.
        """
        core, factor_out, *factors = [
            torch.stack([like.new_zeros(shape) if it is None else _filled(it.tensor[place], shape) for it in updates])
            for place, shape in enumerate(self.component_shapes())
        ]
        scale = torch.tensor([0.0 if it is None else it.scale for it in updates], dtype=torch.float64, device="cpu")
        core = core * scale.to(core).view(-1, *[1] * (core.dim() - 1))
        parts = [core.permute(0, *range(core.dim() - 1, 0, -1)), factor_out.transpose(1, 2), *factors]
        return torch.cat([part.flatten(1) for part in parts], dim=1).to(like)


def _filled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros at the end of each mode, up to this shape."""
    if tensor.shape == shape:
        return tensor
    missing = [size - own for size, own in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for m in reversed(missing) for n in (0, m)])


class RowUpdates(NamedTuple):
    """The updates of the rows of a batch: `packed[index[n]]` is that of row n.

    Attributes:
        packed: (M, `form.width()`), one update in each row, stored in any floating dtype.
        index: (N,), int64.
        form: How a row is packed.
    """

    packed: Tensor
    index: Tensor
    form: PackedTucker


class RowProduct(NamedTuple):
    r"""y[n, o] = sum_{k,i} (W[o, i, k] + s[o, i] D_n[o, i, k]) f_k(x[n, i]), D_n the update of row n.

    Attributes:
        matrix: W as (K I, O); None leaves its part out.
        updates: The updates.
        scale: s (O, I), or None for 1. It does not scale the residual branch.
        has_residual: Whether the last of the K functions is the residual branch.
    """

    matrix: Tensor | None
    updates: RowUpdates
    scale: Tensor | None
    has_residual: bool

    def of_functions(self, functions: Tensor, rows: slice = slice(None)) -> Tensor:
        """The product (R, O) of the functions (R, K, I) at some rows of the batch."""
        packed, index, form = self.updates
        chosen = packed.index_select(0, index[rows].to(packed.device)).to(functions)
        update = self._low_rank(functions, form.unpack(chosen), self.scale)
        return update if self.matrix is None else torch.addmm(update, functions.flatten(1), self.matrix)

    def of_splines(self, x: Tensor, grid: UniformGrid, residual: Tensor | None) -> Tensor:
        """The product (N, O) of the B-splines at x (N, I), and of the factors (N, I) of the residual branch.

        The splines are evaluated once for all updates, in blocks that fit the cache; by plain operations where a
        gradient is needed.
        """
        tensors = (x, residual, self.matrix, self.updates.packed, self.scale)
        needs_gradient = torch.is_grad_enabled() and any([it is not None and it.requires_grad for it in tensors])
        if needs_gradient or needs_plain_operations(x, grid.low, grid.high, self.matrix, residual):
            splines = bspline_basis(x, *grid).transpose(1, 2)
            return self.of_functions(splines if residual is None else torch.cat([splines, residual.unsqueeze(1)], 1))
        inputs, splines = x.shape[1], grid.num_basis
        points = Points(x, grid.low, grid.per_unit, splines, grid.spline_order)
        step = min(max(_MIN_ROWS, block_sizes(x.shape, splines, x.device)[0]), max(1, len(x)))
        evaluator = Evaluator(points, step, functions_first=True)
        buffer = workspace("values", x, step, (splines + (residual is not None)) * inputs)
        result = x.new_empty(len(x), self.updates.form.shape[0])
        for rows in blocks(0, len(x), step):
            values = buffer[: rows.stop - rows.start]
            evaluator.evaluate(rows, values[:, : splines * inputs])
            if residual is not None:
                values[:, splines * inputs :] = residual[rows]
            result[rows] = self.of_functions(values.unflatten(1, (-1, inputs)), rows)
        return result

    def _low_rank(self, functions: Tensor, components: Sequence[Tensor], scale: Tensor | None) -> Tensor:
        """The part (R, O) of the updates whose components (R, ...) are given."""
        core, factor_out, factor_in, factor_basis = components
        reversed_core = core.permute(0, 3, 2, 1)  # (R, rb, ri, ro)
        if scale is None:
            contracted = torch.bmm(torch.bmm(factor_basis.transpose(1, 2), functions), factor_in)  # (R, rb, ri)
            of_outputs = torch.bmm(contracted.flatten(1).unsqueeze(1), reversed_core.flatten(1, 2))  # (R, 1, ro)
            return torch.bmm(of_outputs, factor_out.transpose(1, 2)).squeeze(1)
        # a scale of each edge is no product: the sum over the inputs comes last
        splines = functions.shape[1] - self.has_residual
        of_basis = torch.bmm(factor_basis[:, :splines].transpose(1, 2), functions[:, :splines])  # (R, rb, I)
        edges = torch.bmm(core.transpose(2, 3).flatten(1, 2), factor_in.transpose(1, 2))  # (R, ro rb, I)
        edges = (edges.unflatten(1, core.shape[1::2]) * of_basis.unsqueeze(1)).sum(2)  # (R, ro, I)
        y = ((edges.flatten(0, 1) @ scale.t()).view_as(factor_out.transpose(1, 2)) * factor_out.transpose(1, 2)).sum(1)
        if self.has_residual:
            unscaled = [core, factor_out, factor_in, factor_basis[:, splines:]]
            y = y + self._low_rank(functions[:, splines:], unscaled, None)
        return y
