# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The Jacobian of residuals, from one evaluation of all rows and one backward pass.

A KAN layer is linear in its coefficients (O, I, K + 1). With the jet rows phi (S, I, K + 1) of one row of inputs (see
`derivatives.layers.jet_rows`) and the gradient g (S, O) in the layer's outputs, the row's gradient in the coefficients
is sum_s g[s, o] phi[s, i, k]. One backward pass computes the output gradients of all rows (I. Goodfellow, arXiv
1510.01799). For a Tucker tensor the products go factor by factor, without a tensor of the size of the coefficients.

A residual function is evaluated once, on all n rows, with detached parameters in the KAN layers, whose inputs and
outputs are recorded. Each of m residuals in a row needs a backward pass.
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


MOST_COLUMNS = 64  # with more residuals in a row, `torch.func.vmap` costs less than a backward pass for each

Blocks = dict[int, Tensor]  # the columns (n, m, ...) of the Jacobian of each parameter, by the `id` of the parameter


class LayerRecord(NamedTuple):
    """One evaluation of a KAN layer, or of an `nn.Linear`.

    Attributes:
        formula: The formula of the layer, with its tensors in float64.
        inputs: The other arguments of `evaluate_layer`.
        outputs: Its result, where the graph of the next layers starts.
    """

    formula: LayerFormula
    inputs: tuple[Jet, int, Tensor | None]
    outputs: Jet


class Recorder:
    """A hook of `kan.recording_hook` that records the layers of networks that are evaluated at n = `rows` inputs.

    A layer is recorded if its trained tensors are among the given parameters. All others run with their graphs.
    """

    def __init__(self, parameters: Iterable[Tensor], rows: int) -> None:
        self.rows = rows
        self.layers: list[LayerRecord] = []
        self._parameters = {id(parameter) for parameter in parameters}

    def jet(
        self,
        through: Callable[..., Jet],
        x: Tensor,
        directions: Tensor,
        weights: Tensor | None,
    ) -> Jet | None:
        """Compute a jet, see `recording`."""
        if not self._can_record(x, directions, weights):
            return None
        return through(self._record_layer, x, directions, weights)

    def value(self, network: nn.Module, x: Tensor) -> Tensor | None:
        """Compute outputs, see `recording`. Networks with hooks, or a replaced `forward`, are not recorded."""
        if not self._can_record(x) or torch.nn.modules.module._has_any_global_hook():
            return None
        for module in network.modules():
            if runs_more_than_its_class(module):
                return None
        stages = stages_of(network)
        if stages is None:
            return None
        return through_stages(stages, 0, self._record_layer, x, None, None)[0]

    def _can_record(self, x: Tensor, *constants: Tensor | None) -> bool:
        if not torch.is_grad_enabled() or needs_plain_operations(x):
            return False
        if any(tensor is not None and tensor.requires_grad for tensor in (x, *constants)):
            return False
        return x.dim() == 2 and len(x) == self.rows

    def _record_layer(self, formula: LayerFormula, *inputs: Any) -> Jet:
        """Evaluate a layer, see `evaluate_layer`, and record it."""
        components: list[Any] = [formula.coefficients, formula.residual, formula.bias]
        for update in formula.updates:
            components += update.tensor
        trained = {id(component) for component in components if getattr(component, "requires_grad", False)}
        # with a scale of the edges, the coefficients are no product of factors, and `vmap` takes as long
        if not trained or formula.scale is not None or not trained <= self._parameters:
            return evaluate_layer(formula, *inputs)

        entries = formula._asdict().items()
        detached = {name: value.detach() for name, value in entries if isinstance(value, Tensor)}
        updates = [Update(scale, tensor.map(Tensor.detach)) for scale, tensor in formula.updates]
        constant = formula._replace(updates=tuple(updates), **detached)
        outputs = evaluate_layer(constant, *inputs)
        for output in outputs:
            output.requires_grad_()
        self.layers.append(LayerRecord(formula, inputs, outputs))
        return outputs


def row_gradients(
    function: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    rows: int,
    out: Tensor | None = None,
) -> Tensor | None:
    """Return the derivatives (n m, P) of a function's values (n, m) for n = `rows`, in the first rows of `out`.

    The value of a row must depend on that row only.

    Args:
        function: Returns the values.
        parameters: Leaves, with P entries in all.
        rows: The number n of rows.
        out: Memory for the derivatives.

    Returns:
        None if the values depend on the parameters by anything but the recorded layers of KANs and parameters of no
        dimension.
    """
    with torch.enable_grad(), recording(Recorder(parameters, rows)) as recorder:
        values = function()
    m = values.shape[1]
    outputs: list[Tensor] = []
    for layer in recorder.layers:
        outputs += layer.outputs
    if not outputs or not values.requires_grad or m > MOST_COLUMNS:
        return None

    # one backward pass for each residual of a row; parameters outside of the recorded layers must have no part in it
    tensors = [parameter for parameter in parameters if parameter.dim()]
    scalars = [parameter for parameter in parameters if not parameter.dim()]
    output_gradients = []
    for column in values.unbind(1):
        gradients = torch.autograd.grad(
            column,
            [*outputs, *tensors],
            torch.ones_like(column),
            retain_graph=True,
            allow_unused=True,
        )
        if any(gradient is not None for gradient in gradients[len(outputs) :]):
            return None
        output_gradients.append(gradients)

    sizes = [parameter.numel() for parameter in parameters]
    if out is None:
        out = parameters[0].new_empty(rows * m, sum(sizes))
    jacobian = out[: rows * m].zero_()
    columns_of_parameters = jacobian.split(sizes, dim=-1)
    blocks = {}
    for parameter, columns in zip(parameters, columns_of_parameters, strict=True):
        blocks[id(parameter)] = columns.view(rows, m, *parameter.shape)
    first = 0
    for layer in recorder.layers:
        last = first + len(layer.outputs)
        stacked = [_stack_gradients(layer.outputs, gradients[first:last]) for gradients in output_gradients]
        _add_layer(blocks, layer, torch.stack(stacked, dim=1))
        first = last
    for index, column in enumerate(values.unbind(1)):
        derivatives = _scalar_derivatives(column, scalars)
        for scalar, derivative in zip(scalars, derivatives, strict=True):
            blocks[id(scalar)][:, index] = derivative
    return jacobian


def _stack_gradients(outputs: Jet, gradients: Sequence[Tensor | None]) -> Tensor:
    """Stack gradients of a value in the S rows (n, O) of the outputs, (n, S, O)."""
    stacked = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(output)
        stacked.append(gradient.view(-1, *output.shape[-2:]))
    return torch.cat(stacked).transpose(0, 1)


def _scalar_derivatives(column: Tensor, scalars: Sequence[Tensor]) -> list[Tensor]:
    """Return the derivatives of n values in each scalar, (n,).

    The sum of the derivatives is linear in the weights of the values. Its gradient in the weights has each derivative.
    """
    if not scalars:
        return []
    weights = torch.ones_like(column, requires_grad=True)
    sums = torch.autograd.grad(column, scalars, weights, create_graph=True, materialize_grads=True)
    derivatives = []
    for total in sums:
        derivative = torch.zeros_like(column)
        if total.requires_grad:
            (derivative,) = torch.autograd.grad(total, weights, retain_graph=True, materialize_grads=True)
        derivatives.append(derivative)
    return derivatives


def _add(blocks: Blocks, parameter: Tensor | None, gradient: Tensor) -> None:
    """Add gradients (n, m, ...) in a parameter, in the order of its entries, unless it is not trained."""
    block = blocks.get(id(parameter))
    if block is not None:
        block += gradient.view_as(block)


@torch.no_grad()
def _add_layer(blocks: Blocks, record: LayerRecord, g: Tensor) -> None:
    """Add the gradients in a layer's tensors, from the gradients g (n, m, S, O) in its outputs."""
    formula = record.formula
    coefficients = formula.coefficients
    _add(blocks, formula.bias, g[:, :, 0])
    if formula.basis is None:
        _add_linear(blocks, record, g)
        return
    phi = jet_rows(formula, *record.inputs)  # (n, S, K + 1, I)
    if id(coefficients) in blocks or id(formula.residual) in blocks:
        dense = g.mT.flatten(1, 2) @ phi.flatten(2)
        dense = dense.view(*g.shape[:2], -1, *phi.shape[2:])  # (n, m, O, K + 1, I)
        _add(blocks, formula.residual, dense[..., -1, :])
        if coefficients is not None:
            count = coefficients.shape[2]
            _add(blocks, coefficients, dense[..., :count, :].mT)
    for update in formula.updates:
        if any(id(component) in blocks for component in update.tensor):
            _add_tucker(blocks, phi, update, g)


def _add_linear(blocks: Blocks, record: LayerRecord, g: Tensor) -> None:
    """Add the gradients in the matrix of an `nn.Linear`, sum_s g[o, s] z[s, i], for its inputs z (S, n, I)."""
    block = blocks.get(id(record.formula.residual))
    if block is None:
        return
    z, *derivatives = record.inputs[0]
    rows = [z]
    for derivative in derivatives:
        rows += derivative.expand(-1, *z.shape).unbind()
    if g[0].numel() > z.shape[1]:
        stacked = torch.stack(rows, dim=1)
        block += (g.mT.flatten(1, 2) @ stacked).view_as(block)
        return

    # few outputs of many inputs: no copy of the inputs, and no derivative that the residual does not use
    for row, factors in zip(rows, g.unbind(2), strict=True):
        is_used = (factors != 0).any(0)
        for column, output in is_used.nonzero().tolist():
            factor = factors[:, column, output].unsqueeze(1)
            block[:, column, output].addcmul_(factor, row)


def _add_tucker(
    blocks: Blocks,
    phi: Tensor,
    update: Update,
    g: Tensor,
) -> None:
    """Add the gradients of a Tucker update.

    With phi (n, S, K, I) contracted by factor_in to v (n, S, ri, K), by both factors to t (n, S, ri, rb), and the
    gradient g by factor_out to f (n, m, S, ro), by the core too to h (n, m, S, ri, rb), by all but factor_in to q
    (n, m, S, K, ri), the gradients are sums over s of

        core[a, b, c]: f[a] t[b, c]                factor_out[o, a]: g[o] (core t)[a]
        factor_in[i, b]: sum_k phi[k, i] q[k, b]   factor_basis[k, c]: sum_b v[b, k] h[b, c].

    A full mode has no factor to contract with.
    """
    scale, (core, factor_out, factor_in, factor_basis) = update
    count = update.tensor.shape[2]
    phi = phi[:, :, :count].contiguous()
    v = phi if factor_in is None else phi @ factor_in
    v = v.mT.contiguous()
    t = v if factor_basis is None else v @ factor_basis
    t = t.flatten(2)
    f = scale * g
    if factor_out is not None:
        f = f @ factor_out

    def product(left: Tensor, right: Tensor) -> Tensor:
        """Return sum_sx left[s, x, i] right[m, s, x, j], (n, m, i, j), for left (n, S, X, i), right (n, m, S, X j)."""
        right = right.unflatten(-1, (left.shape[2], -1))
        return torch.einsum("nsxi,nmsxj->nmij", left, right)

    # gradients that nothing asks for are not computed
    if id(core) in blocks:
        _add(blocks, core, f.mT.flatten(1, 2) @ t)
    if id(factor_out) in blocks:
        contracted = scale * t @ core.flatten(1).T
        _add(blocks, factor_out, g.mT.flatten(1, 2) @ contracted)
    if id(factor_in) in blocks:
        expanded = expand_inputs(core, None, factor_basis)
        q = f @ expanded.mT.flatten(1)
        _add(blocks, factor_in, product(phi, q))
    if id(factor_basis) in blocks:
        h = f @ core.flatten(1)
        _add(blocks, factor_basis, product(v, h))
