# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Records of the inputs and outputs of KAN layers, from which `row_gradients` makes the gradients of single rows.

A residual function is evaluated once, on all rows. The networks of KAN layers in the function run with detached
parameters, and their outputs are leaves of the function's graph. The records lead from gradients in these leaves to
gradients in the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..derivatives.api import through_stages
from ..derivatives.layers import Jet, evaluate_layer
from ..derivatives.stages import Stage, stages_of
from ..kan.basis import UniformGrid
from ..kan.product import needs_plain_operations
from ..tucker import Update
from .evaluation import without_modes


class LayerRecord(NamedTuple):
    """One evaluation of a KAN layer."""

    stage: Stage  # the layer, with the coefficients in force
    grid: UniformGrid  # a copy of the grid at that time
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # the arguments of `evaluate_layer`
    outputs: Jet  # of a graph that reaches back to the outputs of the record before


class Chain(NamedTuple):
    """One evaluation of a network: the records of its layers, its outputs, and the leaves that replace them."""

    records: list[LayerRecord]
    outputs: Jet
    leaves: Jet


class Recorder:
    """An `Observer` that records the networks that a function evaluates on a number of rows.

    A layer is recorded if its coefficients are the given parameters (leaves), not copies of them.
    """

    def __init__(self, parameters: Iterable[Tensor], rows: int) -> None:
        self.parameters = list(parameters)
        self.rows = rows
        self.chains: list[Chain] = []
        self.has_gaps = False  # whether a network used a parameter outside of the recorded layers
        self._known = {id(parameter) for parameter in self.parameters}

    def can_record(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether a network is recorded at inputs x, with directions or weights `others`."""
        varies = any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
        of_rows = x.dim() == 2 and len(x) == self.rows
        return torch.is_grad_enabled() and of_rows and not varies and not needs_plain_operations(x)

    def jet(self, through: Callable[..., Jet], x: Tensor, directions: Tensor, weights: Tensor | None) -> Jet | None:
        """See `Observer`."""
        return self._record(through, x, directions, weights) if self.can_record(x, directions, weights) else None

    def value(self, network: nn.Module, x: Tensor) -> Tensor | None:
        """See `Observer`. Dropout, hooks and a `forward` of one module are not recorded: jets do not run them."""

        def changed(part: nn.Module) -> bool:
            hooks = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
            return bool(hooks or getattr(part, "is_random", False))

        if not self.can_record(x) or torch.nn.modules.module._has_any_global_hook():
            return None
        if any(map(changed, network.modules())) or (stages := stages_of(network)) is None:
            return None
        return self._record(partial(through_stages, stages), x, x.new_empty(0, x.shape[-1]), None).value

    def _record(self, through: Callable[..., Jet], *inputs: Tensor | None) -> Jet:
        """Records the layers that a function of the inputs goes through; returns its outputs, as leaves."""
        records: list[LayerRecord] = []
        # the caller may write into its own tensors later
        copies = (None if part is None else part.clone() for part in inputs)
        outputs = through(partial(self._record_layer, records), *copies)
        self.has_gaps |= self._reaches_parameters(outputs.parts)  # of a normalization, for example
        leaves = outputs.map(lambda part: part.detach().clone().requires_grad_())
        self.chains.append(Chain(records, outputs, leaves))
        return leaves

    def _record_layer(self, records: list[LayerRecord], stage: Stage, *inputs: Any) -> Jet:
        """The outputs of a layer for `inputs` of `evaluate_layer`, with a record if parameters are in the layer."""
        components = [part for update in stage.updates for part in (update.scale, *update.tensor)]
        varying = [p for p in (*(stage.dense or ()), *components) if isinstance(p, Tensor) and p.requires_grad]
        if varying and (stage.layer.grid_bounds.requires_grad or any(id(part) not in self._known for part in varying)):
            self.has_gaps = True
        if not varying or self.has_gaps:
            return evaluate_layer(stage, *inputs)
        fixed = stage._replace(
            dense=None if stage.dense is None else (stage.dense[0].detach(), stage.dense[1].detach()),
            updates=tuple(Update(scale, tensor.map(Tensor.detach)) for scale, tensor in stage.updates),
        )
        outputs = evaluate_layer(fixed, *inputs)
        for part in outputs.parts:
            part.requires_grad_()
        low, high, *sizes = stage.grid
        records.append(LayerRecord(stage, UniformGrid(low.clone(), high.clone(), *sizes), inputs, outputs))
        return outputs

    def _reaches_parameters(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graphs of the tensors lead to a parameter."""
        if not (ends := [tensor for tensor in tensors if tensor.requires_grad]):
            return False
        ones = [torch.ones_like(end) for end in ends]
        found = without_modes(torch.autograd.grad, ends, self.parameters, ones, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in found)

    def is_complete(self, values: Tensor) -> bool:
        """Whether a function's values depend on the parameters by nothing but the chains."""
        return bool(self.chains) and not self.has_gaps and not self._reaches_parameters([values])
