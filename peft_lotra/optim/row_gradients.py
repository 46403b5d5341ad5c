# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The gradients of single rows of residuals, from one evaluation of all rows and one backward pass.

A KAN layer is linear in its coefficients (O, I, K + 1). With the jet rows phi (S, I, K + 1) of one row of inputs (see
`derivatives.layers.jet_rows`) and the gradient g (S, O) in the layer's outputs, the row's gradient in the coefficients
is sum_s g[s, o] phi[s, i, k]. One backward pass gives the output gradients of all rows (I. Goodfellow, arXiv
1510.01799). For a Tucker tensor the products go factor by factor, without a tensor of the size of the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..derivatives.chain_rule import Jet
from ..derivatives.layers import jet_rows
from ..kan.recording_hook import recording
from ..tucker import Update
from .layer_records import LayerRecord, Recorder


MOST_COLUMNS = 64  # with more values in a row, one row at a time costs less than a backward pass for each value

Gradients = dict[int, Tensor]  # by the `id` of a tensor


def row_gradients(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], rows: int, out: Tensor | None = None
) -> Tensor | None:
    """The derivatives (rows m, P) of a function's values (rows, m), in the first rows of `out` if given.

    The value of a row must depend on that row alone. None if the values depend on the parameters (leaves, P numbers)
    by anything but the recorded layers of KANs.
    """
    with torch.enable_grad(), recording(Recorder(parameters, rows)) as recorder:
        values = function()
    count = values.shape[1]
    outputs = [part for layer in recorder.layers for part in layer.outputs]
    if not outputs or not values.requires_grad or count > MOST_COLUMNS:
        return None
    by_column: list[Gradients] = []
    for column in values.unbind(1):
        found = torch.autograd.grad(
            column, [*outputs, *parameters], torch.ones_like(column), retain_graph=True, allow_unused=True
        )
        if any(part is not None for part in found[len(outputs) :]):
            return None
        by_column.append({id(part): g for part, g in zip(outputs, found, strict=False) if g is not None})
    sizes = [parameter.numel() for parameter in parameters]
    if out is None:
        out = parameters[0].new_empty(rows * count, sum(sizes))
    gradients = out[: rows * count].zero_().unflatten(0, (rows, count)).split(sizes, dim=-1)
    by_parameter = dict(zip(map(id, parameters), gradients, strict=True))
    for layer in recorder.layers:
        _add_layer(by_parameter, layer, [_stacked(layer.outputs, found) for found in by_column])
    return out[: rows * count]


def _stacked(outputs: Jet, gradients: Gradients) -> Tensor | None:
    """The gradients in the parts of a jet together, (n, S, O); None for zero."""
    if not any(id(part) in gradients for part in outputs):
        return None
    found = [gradients[id(part)] if id(part) in gradients else torch.zeros_like(part) for part in outputs]
    return torch.cat([part if part.dim() == 3 else part.unsqueeze(0) for part in found]).transpose(0, 1)


def _add(block: Gradients, parameter: Tensor, column: int, gradient: Tensor) -> None:
    """Adds a gradient (n, ...) in a parameter, in the order of its entries, to a block (n, m, numel) of the result."""
    if id(parameter) in block:
        target = block[id(parameter)][:, column].view(gradient.shape)
        target += gradient


@torch.no_grad()
def _add_layer(block: Gradients, record: LayerRecord, outputs: list[Tensor | None]) -> None:
    """Adds the gradients of a layer's coefficients, from those (n, S, O) in its outputs by column."""
    if not (columns := [(column, g) for column, g in enumerate(outputs) if g is not None]):
        return
    (z, *derivatives), order, weights = record.inputs
    derivatives = [part.expand(len(part), *z.shape) for part in derivatives]
    if record.grid is None:
        phi = torch.cat([z.unsqueeze(0), *derivatives]).transpose(0, 1)
        assert record.stage.dense is not None
        weight, bias = record.stage.dense
        for column, g in columns:
            _add(block, weight, column, g.mT @ phi)
            _add(block, bias, column, g[:, 0])
        return
    phi = jet_rows(record.grid, [z, *derivatives], order, weights)
    if record.stage.dense is not None and any(id(part) in block for part in record.stage.dense):
        _add_dense(block, phi, *record.stage.dense, columns)
    for update in record.stage.updates:
        if any(id(part) in block for part in update.tensor):
            _add_tucker(block, phi, update, columns)


def _add_dense(block: Gradients, phi: Tensor, spline_weight: Tensor, base_weight: Tensor, columns: list) -> None:
    for column, g in columns:
        gradient = (g.mT @ phi.flatten(2)).unflatten(-1, phi.shape[2:])  # (n, O, K + 1, I)
        for parameter, part in ((spline_weight, gradient[:, :, :-1].mT), (base_weight, gradient[:, :, -1])):
            if id(parameter) in block:
                _add(block, parameter, column, part)


def _add_tucker(block: Gradients, phi: Tensor, update: Update, columns: list) -> None:
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
    mixed = scale * t.flatten(2) @ mixing.T if id(factor_out) in block else t
    expanded = (factor_basis @ core.mT).flatten(1) if id(factor_in) in block else core  # (ro, K ri)
    for column, g in columns:
        f = scale * g @ factor_out
        if id(core) in block:
            _add(block, core, column, (f.mT @ t.flatten(2)).unflatten(-1, core.shape[1:]))
        if id(factor_out) in block:
            _add(block, factor_out, column, g.mT @ mixed)
        if id(factor_in) in block:
            q = (f @ expanded).view(len(f), -1, core.shape[1])
            _add(block, factor_in, column, phi.flatten(1, 2).mT @ q)
        if id(factor_basis) in block:
            h = (f @ mixing).view(len(f), -1, core.shape[2])
            _add(block, factor_basis, column, v.flatten(1, 2).mT @ h)
