# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Records of the inputs and outputs of KAN layers, from which `row_gradients` computes the gradients of single rows.

A residual function is evaluated once, on all rows, with detached parameters in the KAN layers. The records lead from
gradients in the outputs of these layers to gradients in their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..derivatives.api import through_stages
from ..derivatives.chain_rule import Jet
from ..derivatives.layers import evaluate_layer
from ..derivatives.stages import Stage, stages_of
from ..kan.basis import UniformGrid
from ..kan.product import needs_plain_operations
from ..tucker import Update


class LayerRecord(NamedTuple):
    """One evaluation of a KAN layer, or of an `nn.Linear`."""

    stage: Stage  # the layer with its coefficients
    grid: UniformGrid | None
    inputs: tuple[Jet, int, Tensor | None]  # the arguments of `evaluate_layer`
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

        def changed(part: nn.Module) -> bool:
            hooks = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
            return bool(hooks or getattr(part, "is_random", False))

        if not self._can_record(x) or torch.nn.modules.module._has_any_global_hook():
            return None
        if any(map(changed, network.modules())) or (stages := stages_of(network)) is None:
            return None
        return through_stages(stages, 0, self._record_layer, x, None, None)[0]

    def _can_record(self, x: Tensor, *others: Tensor | None) -> bool:
        varies = any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
        of_rows = x.dim() == 2 and len(x) == self.rows
        return torch.is_grad_enabled() and of_rows and not varies and not needs_plain_operations(x)

    def _record_layer(self, stage: Stage, *inputs: Any) -> Jet:
        """As `evaluate_layer`; appends a record if all trained coefficients of the layer are known."""
        components = [part for update in stage.updates for part in (update.scale, *update.tensor)]
        trained = [p for p in (*(stage.dense or ()), *components) if isinstance(p, Tensor) and p.requires_grad]
        if not trained or any(id(part) not in self._known for part in trained):
            return evaluate_layer(stage, *inputs)
        fixed = stage._replace(
            dense=stage.dense and tuple(None if part is None else part.detach() for part in stage.dense),
            updates=tuple(Update(scale, tensor.map(Tensor.detach)) for scale, tensor in stage.updates),
        )
        outputs = evaluate_layer(fixed, *inputs)
        for part in outputs:
            part.requires_grad_()
        grid = None if stage.is_linear else stage.module.grid
        self.layers.append(LayerRecord(stage, grid, inputs, outputs))
        return outputs
