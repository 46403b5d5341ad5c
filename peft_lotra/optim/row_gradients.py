# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The gradients of single rows of residuals, from one evaluation of all rows and one backward pass.

A KAN layer is linear in its coefficients (O, I, K + 1). With the jet rows phi (S, I, K + 1) of one row of inputs (see
`kan.jets.layers.jet_rows`) and the gradient g (S, O) in the layer's outputs, the row's gradient in the coefficients is
sum_s g[s, o] phi[s, i, k]. One backward pass gives the output gradients of all rows (I. Goodfellow, arXiv 1510.01799).
For a Tucker tensor the products go factor by factor, without a tensor of the size of the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..derivatives.layers import Jet, jet_rows
from ..kan.observer import observing
from ..tucker import Update
from .recording import Chain, LayerRecord, Recorder


BLOCK = 2**19  # numbers in the largest tensor of a block of rows: near the cache, and enough for a small overhead
MOST_COLUMNS = 64  # with more values in a row, one row at a time costs less than three backward passes for each


def row_gradients(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], rows: int, out: Tensor | None = None
) -> Tensor | None:
    """The derivatives (rows m, P) of a function's values (rows, m), in the first rows of `out` if given.

    None if the values depend on the parameters (leaves, P numbers) not by recorded networks alone, or one row on
    others, or the function fails.
    """
    try:
        with torch.enable_grad(), observing(Recorder(parameters, rows)) as recorder:
            values = function()
        count = values.shape[1]
        if count > MOST_COLUMNS or not recorder.is_complete(values):
            return None
        if (towards := _towards_chains(recorder.chains, values)) is None:
            return None
        records = [pair for chain in recorder.chains for pair in _towards_layers(chain, towards)]
    except Exception:  # an error of the function is met again by the way for any function
        return None
    if out is None:
        out = parameters[0].new_empty(rows * count, sum(parameter.numel() for parameter in parameters))
    gradients = out[: rows * count].unflatten(0, (rows, count))
    size = max(16, BLOCK // max([_numbers_of_row(record) for record, _ in records], default=1))
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        block = _RowSums(gradients[part], parameters)
        for record, outputs in records:
            _add_layer(block, record, outputs, part)
        block.finish()
    return out[: rows * count]


Gradients = dict[int, Tensor]  # in a tensor with this id


def _towards_chains(chains: list[Chain], values: Tensor) -> list[Gradients] | None:
    """For each column of the values (n, m), the gradients in the leaves of the chains; None if rows are coupled.

    Gradients with a weight for each row are then not the weighted gradients. With powers of two for weights, the two
    are otherwise equal to the last bit.
    """
    leaves = [part for chain in chains for part in chain.leaves.parts]
    exponents = torch.randperm(len(values), generator=torch.Generator().manual_seed(0), device="cpu") % 401 - 200
    weights = torch.ldexp(values.new_ones(len(values)), exponents.to(values.device))
    if not values.requires_grad:
        return [{}] * values.shape[1]
    towards = []
    for column in values.unbind(1):
        found, weighted = (
            torch.autograd.grad(column, leaves, of_rows, retain_graph=True, allow_unused=True)
            for of_rows in (torch.ones_like(weights), weights)
        )
        gradients: Gradients = {}
        for leaf, one, other in zip(leaves, found, weighted, strict=True):
            if one is not None and not torch.equal(one * weights.unsqueeze(1), other):
                return None
            elif one is not None:
                gradients[id(leaf)] = one
        towards.append(gradients)
    return towards


def _towards_layers(chain: Chain, towards: list[Gradients]) -> list[tuple[LayerRecord, list[Tensor | None]]]:
    """The records of a chain, each with the gradients (n, S, O) in its outputs for each column; None for zero."""
    inner = [part for record in chain.records for part in record.outputs.parts]
    by_column: list[Gradients] = []
    for gradients in towards:
        ends = [
            (part, gradients[id(leaf)])
            for part, leaf in zip(chain.outputs.parts, chain.leaves.parts, strict=True)
            if part.requires_grad and id(leaf) in gradients
        ]
        found: Sequence[Tensor | None] = [None] * len(inner)
        if ends and inner:
            outputs, given = zip(*ends, strict=True)
            found = torch.autograd.grad(outputs, inner, given, retain_graph=True, allow_unused=True)
        by_column.append({id(part): one for part, one in zip(inner, found, strict=True) if one is not None})
    return [(record, [_as_rows(record.outputs, g) for g in by_column]) for record in chain.records]


def _as_rows(outputs: Jet, gradients: Gradients) -> Tensor | None:
    """The gradients in the parts of a jet together, (n, S, O); None for zero."""
    if not any(id(part) in gradients for part in outputs.parts):
        return None
    found = [gradients[id(part)] if id(part) in gradients else torch.zeros_like(part) for part in outputs.parts]
    return torch.cat([part if part.dim() == 3 else part.unsqueeze(0) for part in found]).transpose(0, 1)


class _RowSums:
    """The gradients (n, m, P) of some rows, as the sum of what layers add."""

    def __init__(self, gradients: Tensor, parameters: Sequence[Tensor]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self._gradients = dict(zip(map(id, parameters), gradients.split(sizes, dim=-1), strict=True))
        self._missing = {(key, column) for key in self._gradients for column in range(gradients.shape[1])}

    def wants(self, parameter: Tensor) -> bool:
        return id(parameter) in self._gradients

    def add(self, parameter: Tensor, column: int, gradient: Tensor) -> None:
        """Adds a gradient (n, ...), whose entries of a row are in the order of the parameter's."""
        target = self._gradients[id(parameter)][:, column].view(gradient.shape)
        if (id(parameter), column) in self._missing:
            target.copy_(gradient)
            self._missing.remove((id(parameter), column))
        else:
            target += gradient

    def finish(self) -> None:
        """Writes zeros for the parameters to which nothing was added."""
        for key, column in self._missing:
            self._gradients[key][:, column].zero_()


def _numbers_of_row(record: LayerRecord) -> int:
    """The size of the largest tensor of a row."""
    _, first, _, weights = record.inputs
    outputs, inputs, basis = record.stage.shape
    rows = 1 + len(first) + (len(first) if weights is None else 1)
    dense = any(part.requires_grad for part in record.stage.dense or ())
    return inputs * basis * max(rows, outputs if dense else 0)


@torch.no_grad()
def _add_layer(block: _RowSums, record: LayerRecord, outputs: list[Tensor | None], rows: slice) -> None:
    """Adds the gradients of a layer's coefficients for some rows, from those (n, S, O) in its outputs by column."""
    if not (columns := [(column, g[rows]) for column, g in enumerate(outputs) if g is not None]):
        return
    z, first, second, weights = record.inputs
    first = first.expand(len(first), *z.shape)[:, rows]
    second = None if second is None else second[:, rows]
    phi = jet_rows(record.grid, z[rows], first, second, weights, len(z))
    if record.stage.dense is not None and any(map(block.wants, record.stage.dense)):
        _add_dense(block, phi, *record.stage.dense, columns)
    for update in record.stage.updates:
        if any(map(block.wants, update.tensor)):
            _add_tucker(block, phi, update, columns)


def _add_dense(block: _RowSums, phi: Tensor, spline_weight: Tensor, base_weight: Tensor, columns: list) -> None:
    for column, g in columns:
        gradient = (g.mT @ phi.flatten(2)).unflatten(-1, phi.shape[2:])  # (n, O, K + 1, I)
        for parameter, part in ((spline_weight, gradient[:, :, :-1].mT), (base_weight, gradient[:, :, -1])):
            if block.wants(parameter):
                block.add(parameter, column, part)


def _add_tucker(block: _RowSums, phi: Tensor, update: Update, columns: list) -> None:
    """Adds the gradients of a Tucker update.

    With phi (n, S, K, I) contracted by factor_in to v (n, S, ri, K), by both factors to t (n, S, ri, rb), and the
    gradient g by factor_out to f (n, S, ro), by the core too to h (n, S, ri, rb), by all but factor_in to q
    (n, S, K, ri), the gradients are sums over s of

        core[a, b, c]: f[a] t[b, c]                factor_out[o, a]: g[o] (core t)[a]
        factor_in[i, b]: sum_k phi[k, i] q[k, b]   factor_basis[k, c]: sum_b v[b, k] h[b, c].
    """
    scale, (core, factor_out, factor_in, factor_basis) = update
    phi = phi[:, :, : len(factor_basis)].contiguous()
    v = (phi @ factor_in).mT.contiguous()
    t = v @ factor_basis
    mixing = core.flatten(1)
    # what the gradients of other components alone need is left out
    mixed = scale * t.flatten(2) @ mixing.T if block.wants(factor_out) else t
    expanded = (factor_basis @ core.mT).flatten(1) if block.wants(factor_in) else core  # (ro, K ri)
    for column, g in columns:
        f = scale * g @ factor_out
        if block.wants(core):
            block.add(core, column, (f.mT @ t.flatten(2)).unflatten(-1, core.shape[1:]))
        if block.wants(factor_out):
            block.add(factor_out, column, g.mT @ mixed)
        if block.wants(factor_in):
            q = (f @ expanded).view(len(f), -1, core.shape[1])
            block.add(factor_in, column, phi.flatten(1, 2).mT @ q)
        if block.wants(factor_basis):
            h = (f @ mixing).view(len(f), -1, core.shape[2])
            block.add(factor_basis, column, v.flatten(1, 2).mT @ h)
