# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The gradients of single rows of residuals, from one evaluation of all rows and one backward pass.

A KAN layer is linear in its coefficients (O, I, K + 1). With the jet rows phi (S, I, K + 1) of one row of inputs (see
`derivatives.layers.jet_rows`) and the gradient g (S, O) in the layer's outputs, the row's gradient in the coefficients
is sum_s g[s, o] phi[s, i, k]. One backward pass gives the output gradients of all rows (I. Goodfellow, arXiv
1510.01799). For a Tucker tensor the products go factor by factor, without a tensor of the size of the coefficients.

A residual function is evaluated once, on all n rows, with detached parameters in the KAN layers, whose inputs and
outputs are recorded. Of m residuals in a row, each takes a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..derivatives.api import through_stages
from ..derivatives.chain_rule import Jet
from ..derivatives.layers import evaluate_layer, jet_rows
from ..derivatives.stages import stages_of
from ..kan.formula import LayerFormula
from ..kan.product import needs_plain_operations
from ..kan.recording_hook import recording
from ..modules.calls import runs_more_than_its_class
from ..tucker import Update, expand_inputs


MOST_COLUMNS = 64  # with more values in a row, one row at a time costs less than a backward pass for each value

ByTensor = dict[int, Tensor]  # by the `id` of another tensor


class LayerRecord(NamedTuple):
    """One evaluation of a KAN layer, or of an `nn.Linear`."""

    formula: LayerFormula  # read in the call, in which the layer's tensors are in float64
    inputs: tuple[Jet, int, Tensor | None]  # the other arguments of `evaluate_layer`
    outputs: Jet  # of a graph that starts at the outputs of the first layer


class Recorder:
    """A hook of `kan.recording_hook` that records the layers of networks that are evaluated at n = `rows` inputs.

    A layer is recorded if its coefficients are among the given parameters. All others run with their graphs.
    """

    def __init__(self, parameters: Iterable[Tensor], rows: int) -> None:
        self.rows = rows
        self.layers: list[LayerRecord] = []
        self._known = {id(parameter) for parameter in parameters}

    def jet(self, through: Callable[..., Jet], x: Tensor, directions: Tensor, weights: Tensor | None) -> Jet | None:
        """See `recording`."""
        can_record = self._can_record(x, directions, weights)
        return through(self._record_layer, x, directions, weights) if can_record else None

    def value(self, network: nn.Module, x: Tensor) -> Tensor | None:
        """See `recording`. Networks with dropout, hooks, or a replaced `forward` are not recorded."""
        if not self._can_record(x) or torch.nn.modules.module._has_any_global_hook():
            return None
        if any(runs_more_than_its_class(m) or getattr(m, "is_random", False) for m in network.modules()):
            return None
        if (stages := stages_of(network)) is None:
            return None
        return through_stages(stages, 0, self._record_layer, x, None, None)[0]

    def _can_record(self, x: Tensor, *others: Tensor | None) -> bool:
        varies = any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
        of_rows = x.dim() == 2 and len(x) == self.rows
        return torch.is_grad_enabled() and of_rows and not varies and not needs_plain_operations(x)

    def _record_layer(self, formula: LayerFormula, *inputs: Any) -> Jet:
        """As `evaluate_layer`; appends a record if all trained tensors of the layer are known parameters."""
        components = [part for update in formula.updates for part in (update.scale, *update.tensor)]
        dense = (formula.coefficients, formula.residual, formula.bias)
        trained = [part for part in (*dense, *components) if isinstance(part, Tensor) and part.requires_grad]
        # a scale of the edges is no product of factors: `vmap` takes as long as sums by edge do
        is_scaled = formula.scale is not None
        if not trained or is_scaled or any(id(part) not in self._known for part in trained):
            return evaluate_layer(formula, *inputs)
        fixed = formula._replace(
            coefficients=_detach(formula.coefficients),
            residual=_detach(formula.residual),
            bias=_detach(formula.bias),
            updates=tuple(Update(gain, tensor.map(Tensor.detach)) for gain, tensor in formula.updates),
        )
        outputs = evaluate_layer(fixed, *inputs)
        for part in outputs:
            part.requires_grad_()
        self.layers.append(LayerRecord(formula, inputs, outputs))
        return outputs


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def row_gradients(
    function: Callable[[], Tensor], parameters: Sequence[Tensor], rows: int, out: Tensor | None = None
) -> Tensor | None:
    """Return the derivatives (n m, P) of a function's values (n, m) for n = `rows`, in the first rows of `out`.

    The value of a row must depend on that row only. None if the values depend on the parameters (leaves, P numbers)
    by anything but the recorded layers of KANs, and parameters of no dimension.
    """
    with torch.enable_grad(), recording(Recorder(parameters, rows)) as recorder:
        values = function()
    m = values.shape[1]
    outputs = [part for layer in recorder.layers for part in layer.outputs]
    if not outputs or not values.requires_grad or m > MOST_COLUMNS:
        return None
    tensors = [parameter for parameter in parameters if parameter.dim()]
    scalars = [parameter for parameter in parameters if not parameter.dim()]
    columns = []
    for column in values.unbind(1):
        gradients = torch.autograd.grad(
            column, [*outputs, *tensors], torch.ones_like(column), retain_graph=True, allow_unused=True
        )
        if any(gradient is not None for gradient in gradients[len(outputs) :]):
            return None
        columns.append(iter(gradients))
    sizes = [parameter.numel() for parameter in parameters]
    if out is None:
        out = parameters[0].new_empty(rows * m, sum(sizes))
    blocks = out[: rows * m].zero_().unflatten(0, (rows, m)).split(sizes, dim=-1)
    sums = {id(p): block.view(rows, m, *p.shape) for p, block in zip(parameters, blocks, strict=True)}
    for layer in recorder.layers:
        of_layer = []
        for gradients in columns:
            # each column has the gradients of one layer after another
            for output, gradient in zip(layer.outputs, gradients, strict=False):
                gradient = torch.zeros_like(output) if gradient is None else gradient
                of_layer.append(gradient if gradient.dim() == 3 else gradient.unsqueeze(0))
        joined = torch.cat(of_layer).unflatten(0, (m, -1)).permute(2, 0, 1, 3)
        _add_layer(sums, layer, joined)
    for index, column in enumerate(values.unbind(1)):
        for scalar, derivatives in zip(scalars, _scalar_derivatives(column, scalars), strict=True):
            sums[id(scalar)][:, index] = derivatives
    return out[: rows * m]


def _scalar_derivatives(column: Tensor, scalars: Sequence[Tensor]) -> list[Tensor]:
    """Return the derivatives of n values in each scalar, (n,).

    The sum of the derivatives is linear in the weights of the values, and its gradient in them has each one.
    """
    if not scalars:
        return []
    weights = torch.ones_like(column, requires_grad=True)
    sums = torch.autograd.grad(column, scalars, weights, create_graph=True, allow_unused=True)
    derivatives = []
    for total in sums:
        gradient = None
        if total is not None and total.requires_grad:
            (gradient,) = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        derivatives.append(torch.zeros_like(column) if gradient is None else gradient)
    return derivatives


def _add(sums: ByTensor, parameter: Tensor | None, gradient: Tensor) -> None:
    """Adds gradients (n, m, ...) in a parameter, in the order of its entries, unless it is not trained."""
    if (total := sums.get(id(parameter))) is not None:
        total += gradient.view_as(total)


@torch.no_grad()
def _add_layer(sums: ByTensor, record: LayerRecord, g: Tensor) -> None:
    """Adds the gradients in a layer's coefficients, from those in its outputs, (n, m, S, O)."""
    formula, (jet, order, weights) = record.formula, record.inputs
    z, *derivatives = jet
    if formula.basis is None:
        phi = torch.cat([z.unsqueeze(0), *(part.expand(len(part), *z.shape) for part in derivatives)])
        _add(sums, formula.residual, g.mT.flatten(1, 2) @ phi.transpose(0, 1))
        _add(sums, formula.bias, g[:, :, 0])
        return
    phi = jet_rows(formula, jet, order, weights)
    coefficients = formula.coefficients
    if coefficients is not None and (id(coefficients) in sums or id(formula.residual) in sums):
        dense = (g.mT.flatten(1, 2) @ phi.flatten(2)).view(*g.shape[:2], -1, *phi.shape[2:])  # (n, m, O, K + 1, I)
        _add(sums, coefficients, dense[..., : coefficients.shape[2], :].mT)
        _add(sums, formula.residual, dense[..., -1, :])
    for update in formula.updates:
        if any(id(part) in sums for part in update.tensor):
            _add_tucker(sums, phi, update, g)


def _add_tucker(sums: ByTensor, phi: Tensor, update: Update, g: Tensor) -> None:
    """Adds the gradients of a Tucker update.

    With phi (n, S, K, I) contracted by factor_in to v (n, S, ri, K), by both factors to t (n, S, ri, rb), and the
    gradient g by factor_out to f (n, m, S, ro), by the core too to h (n, m, S, ri, rb), by all but factor_in to q
    (n, m, S, K, ri), the gradients are sums over s of

        core[a, b, c]: f[a] t[b, c]                factor_out[o, a]: g[o] (core t)[a]
        factor_in[i, b]: sum_k phi[k, i] q[k, b]   factor_basis[k, c]: sum_b v[b, k] h[b, c].

    A full mode has no factor to contract with.
    """
    scale, (core, factor_out, factor_in, factor_basis) = update
    n, m = g.shape[:2]
    phi = phi[:, :, : update.tensor.shape[2]].contiguous()
    v = (phi if factor_in is None else phi @ factor_in).mT.contiguous()
    t = (v if factor_basis is None else v @ factor_basis).flatten(2)
    f = scale * g if factor_out is None else scale * g @ factor_out

    def product(left: Tensor, right: Tensor) -> Tensor:
        """sum_x left[x, i] right[m, x, j], (n, m, i, j), for left (n, S, X / S, i) and right (n, m, S, ...)."""
        right = right.reshape(n, m, left.shape[1] * left.shape[2], -1).transpose(1, 2)
        return (left.flatten(1, 2).mT @ right.flatten(2)).unflatten(2, (m, -1)).transpose(1, 2)

    # what the gradients of other components alone need is left out
    if id(core) in sums:
        _add(sums, core, f.mT.flatten(1, 2) @ t)
    if id(factor_out) in sums:
        _add(sums, factor_out, g.mT.flatten(1, 2) @ (scale * t @ core.flatten(1).T))
    if id(factor_in) in sums:
        _add(sums, factor_in, product(phi, f @ expand_inputs(core, None, factor_basis).mT.flatten(1)))
    if id(factor_basis) in sums:
        _add(sums, factor_basis, product(v, f @ core.flatten(1)))
