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
"""The gradients of single rows of residuals, from one evaluation of all rows and one backward pass.

A KAN layer is linear in its coefficients (O, I, K + 1): with the features phi (S, I, K + 1) of a row, in S streams
(value and derivatives, as in `kan/layer_jets.py`), and the gradient g (S, O) in its outputs, the row's gradient in the
coefficients is sum_s g[s, o] phi[s, i, k]. So inputs and output gradients of the layers, which one backward pass gives
for all rows, are enough (as for the norms of gradients, I. Goodfellow, arXiv 1510.01799). For a Tucker tensor the
products go factor by factor, and nothing of the size of the coefficients is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kan.jets.layers import stream_features
from ..kan.layer_records import Chain, LayerRecord, recording
from ..tucker import Update


# Numbers in the largest tensor of a block of rows: near the cache, and enough for the overhead to be small.
BLOCK = 2**19

# With more values in a row, one row at a time costs less than three backward passes for each.
MOST_COLUMNS = 64


def row_gradients(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], rows: int, out: Tensor | None = None
) -> Tensor | None:
    """
    The derivatives of a function's values row by row, (rows m, P), where they depend on the parameters by nothing but
    networks that are recorded (see `kan/layer_records.py`).

    Args:
        function: returns values (rows, m), each row by itself. The parameters must be those of the model when it runs.
        parameters: leaves, of P numbers together.
        rows: how many.
        out: (rows m or more, P), whose first rows get the derivatives.

    Returns:
        The derivatives; None if the values depend on the parameters in another way, or on several rows, or the
        function cannot be evaluated like this.
    """
    try:
        with torch.enable_grad(), recording(parameters, rows) as recorder:
            values = function()
        count = values.shape[1]
        if count > MOST_COLUMNS or not recorder.explains(values):
            return None
        towards = _towards_chains(recorder.chains, values)
        if towards is None:
            return None
        records = [pair for chain in recorder.chains for pair in _towards_layers(chain, towards)]
    except Exception:  # if the function is to blame, the way for any function will meet it again
        return None
    if out is None:
        out = parameters[0].new_empty(rows * count, sum(parameter.numel() for parameter in parameters))
    out = out[: rows * count]
    gradients = out.unflatten(0, (rows, count))
    size = max(16, BLOCK // max([_numbers_of_row(record) for record, _ in records], default=1))
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        block = _RowSums(gradients[part], parameters)
        for record, outputs in records:
            _add_layer(block, record, outputs, part)
        block.finish()
    return out


# Backward to the outputs of layers, all rows at once

Gradients = dict[int, Tensor]  # in a tensor with this id


def _towards_chains(chains: list[Chain], values: Tensor) -> list[Gradients] | None:
    """
    For each column of the values (n, m), its gradients in what the function got from the chains.

    None where rows do not stay by themselves (the function turned them around, say): then the gradients with a weight
    for each row are not the weighted gradients. With powers of two for weights, those are equal to the last bit.
    """
    leaves = [part for chain in chains for part in chain.leaves if part is not None]
    exponents = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)) % 401 - 200
    weights = torch.ldexp(values.new_ones(len(values)), exponents.to(values.device))
    if not values.requires_grad:
        return [{}] * values.shape[1]
    towards = []
    for column in values.unbind(1):
        found, weighted = (
            torch.autograd.grad(column, leaves, of_rows, retain_graph=True, allow_unused=True)
            for of_rows in (torch.ones_like(weights), weights)
        )
        pairs = [(one, other) for one, other in zip(found, weighted, strict=True) if one is not None]
        if not all(torch.equal(one * weights.unsqueeze(1), other) for one, other in pairs):
            return None
        towards.append({id(leaf): one for leaf, one in zip(leaves, found, strict=True) if one is not None})
    return towards


def _towards_layers(chain: Chain, towards: list[Gradients]) -> list[tuple[LayerRecord, list[Tensor | None]]]:
    """The records of a chain with, for each column, the gradients in their outputs, (n, S, O); None for zero."""
    inner = [part for record in chain.records for part in record.outputs if part is not None]
    by_column: list[Gradients] = []
    for gradients in towards:
        ends = [
            (part, gradients[id(leaf)])
            for part, leaf in zip(chain.outputs, chain.leaves, strict=True)
            if part is not None and part.requires_grad and id(leaf) in gradients
        ]
        found = [None] * len(inner)
        if ends and inner:
            outputs, given = zip(*ends, strict=True)
            found = torch.autograd.grad(outputs, inner, given, retain_graph=True, allow_unused=True)
        by_column.append({id(part): one for part, one in zip(inner, found, strict=True) if one is not None})
    return [(record, [_in_streams(record.outputs, g) for g in by_column]) for record in chain.records]


def _in_streams(outputs: Sequence[Tensor | None], gradients: Gradients) -> Tensor | None:
    parts = [part for part in outputs if part is not None]
    if not any(id(part) in gradients for part in parts):
        return None
    found = [gradients[id(part)] if id(part) in gradients else torch.zeros_like(part) for part in parts]
    return torch.cat([part if part.dim() == 3 else part.unsqueeze(0) for part in found]).transpose(0, 1)


# From there to the coefficients, row by row


class _RowSums:
    """The gradients of some rows, (n, m, P), as the sum of what layers add."""

    def __init__(self, gradients: Tensor, parameters: Sequence[Tensor]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self._gradients = dict(zip(map(id, parameters), gradients.split(sizes, dim=-1), strict=True))
        self._columns = range(gradients.shape[1])
        self._begun: set[tuple[int, int]] = set()

    def wants(self, parameter: Tensor) -> bool:
        return id(parameter) in self._gradients

    def add(self, parameter: Tensor, column: int, gradient: Tensor) -> None:
        """Adds (n, ...), the rest in the order of the parameter's entries."""
        target = self._gradients[id(parameter)][:, column].view(gradient.shape)
        if (id(parameter), column) in self._begun:
            target += gradient
        else:
            target.copy_(gradient)
            self._begun.add((id(parameter), column))

    def finish(self) -> None:
        """Zero for what nothing was added to."""
        for key, gradient in self._gradients.items():
            for column in self._columns:
                if (key, column) not in self._begun:
                    gradient[:, column].zero_()


def _numbers_of_row(record: LayerRecord) -> int:
    """In the largest tensor of a row."""
    z, first, _, weights, _ = record.inputs
    features = z.shape[1] * (record.grid.grid_size + record.grid.spline_order + 1)
    streams = 1 + len(first) + (len(first) if weights is None else 1)
    dense = record.dense is not None and any(part.requires_grad for part in record.dense)
    return features * max(streams, record.outputs[-1].shape[-1] if dense else 0)


@torch.no_grad()
def _add_layer(block: _RowSums, record: LayerRecord, outputs: list[Tensor | None], rows: slice) -> None:
    """Adds what a layer gives to some rows, from the gradients (n, S, O) in its outputs for each column."""
    columns = [(column, of_all[rows]) for column, of_all in enumerate(outputs) if of_all is not None]
    if not columns:
        return
    z, first, second, weights, only_second = record.inputs
    first = first.expand(len(first), *z.shape)[:, rows]
    second = None if second is None else second[:, rows]
    features = stream_features(record.grid, z[rows], first, second, weights, only_second, len(z))
    if record.dense is not None and any(map(block.wants, record.dense)):
        _add_dense(block, features, *record.dense, columns)
    for update in record.updates:
        if any(map(block.wants, update.tensor)):
            _add_tucker(block, features, update, columns)


def _add_dense(block: _RowSums, phi: Tensor, spline_weight: Tensor, base_weight: Tensor, columns: list) -> None:
    for column, g in columns:
        gradient = (g.mT @ phi.flatten(2)).unflatten(-1, phi.shape[2:])  # (n, O, K + 1, I)
        for parameter, part in ((spline_weight, gradient[:, :, :-1].mT), (base_weight, gradient[:, :, -1])):
            if block.wants(parameter):
                block.add(parameter, column, part)


def _add_tucker(block: _RowSums, phi: Tensor, update: Update, columns: list) -> None:
    """
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
    mixed = scale * t.flatten(2) @ mixing.T
    expanded = (factor_basis @ core.mT).flatten(1)  # (ro, K ri)
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
