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

"""Records of what passes KAN layers, from which the gradients of single rows are made (`row_gradients.py`).

A residual function is evaluated once, on all rows. The networks of KAN layers that it evaluates, by `jet` or by a
forward pass, run with their parameters detached, and their outputs are leaves of the function's graph. The records
lead from gradients in these leaves to gradients in the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..kan.basis import UniformGrid
from ..kan.jets.chain import Stage, stages_of
from ..kan.jets.derivatives import through_stages
from ..kan.jets.layers import Jet, evaluate_layer
from ..kan.observer import observing
from ..kan.product import needs_plain_operations
from ..tucker import Update


@dataclass
class LayerRecord:
    """
    One evaluation of a KAN layer.

    Attributes:
        stage: the layer, with the coefficients in force.
        grid: a copy of its grid at that time.
        inputs: z (N, I), z', z'', weights and only_second, the arguments of `evaluate_layer`.
        outputs: of a graph that reaches back to the outputs of the record before.
    """

    stage: Stage
    grid: UniformGrid
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]
    outputs: Jet


@dataclass
class Chain:
    """One evaluation of a network: its records, its outputs, and the leaves that the function got instead of them."""

    records: list[LayerRecord]
    outputs: Jet
    leaves: Jet


class Recorder:
    """
    An `Observer` that records the networks that a function evaluates.

    Args:
        parameters: leaves that stand for the trainable parameters. A layer is recorded if its coefficients are these
            tensors, not copies of them.
        rows: the number of rows that the function is evaluated on.

    Attributes:
        chains: the networks evaluated.
        has_gaps: whether a network used a parameter outside of the recorded layers; the records are then invalid.
    """

    def __init__(self, parameters: Iterable[Tensor], rows: int) -> None:
        self.parameters = list(parameters)
        self.rows = rows
        self.chains: list[Chain] = []
        self.has_gaps = False
        self._known = {id(parameter) for parameter in self.parameters}

    def can_record(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether a network is recorded at inputs x, with directions or weights `others`."""
        return (
            torch.is_grad_enabled()
            and x.dim() == 2
            and len(x) == self.rows
            and not needs_plain_operations(x)
            and not any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
        )

    def jet(self, through: Callable[..., Jet], x: Tensor, directions: Tensor, weights: Tensor | None) -> Jet | None:
        """See `Observer`."""
        return self._record(through, x, directions, weights) if self.can_record(x, directions, weights) else None

    def value(self, network: nn.Module, x: Tensor) -> Tensor | None:
        """See `Observer`. A network is not recorded if it draws dropout, or has hooks or a `forward` put on a module,
        which a forward pass runs, unlike a jet."""
        if not self.can_record(x) or torch.nn.modules.module._has_any_global_hook():
            return None
        for part in network.modules():
            changed = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
            if changed or getattr(part, "is_random", False):
                return None
        if (stages := stages_of(network)) is None:
            return None
        return self._record(partial(through_stages, stages, False), x, x.new_empty(0, x.shape[-1]), None).value

    def _record(self, through: Callable[..., Jet], *inputs: Tensor | None) -> Jet:
        """Records the layers that a function of the inputs goes through; returns its outputs, as leaves.

        Inputs and leaves are copies: what the caller writes into its own tensors later must not change the records.
        """
        records: list[LayerRecord] = []
        copies = (None if part is None else part.clone() for part in inputs)
        outputs = through(partial(self._record_layer, records), *copies)
        if self._reaches_parameters(outputs.parts):
            self.has_gaps = True  # of a normalization, for example
        leaves = outputs.map(lambda part: part.detach().clone().requires_grad_())
        self.chains.append(Chain(records, outputs, leaves))
        return leaves

    def _record_layer(
        self,
        records: list[LayerRecord],
        stage: Stage,
        z: Tensor,
        first: Tensor,
        second: Tensor | None,
        weights: Tensor | None,
        only_second: bool,
    ) -> Jet:
        inputs = z, first, second, weights, only_second
        components = [part for update in stage.updates for part in (update.scale, *update.tensor)]
        coefficients = [*(stage.dense or ()), *components]
        varying = [part for part in coefficients if isinstance(part, Tensor) and part.requires_grad]
        if not varying:
            return evaluate_layer(stage, *inputs)
        if stage.layer.grid_bounds.requires_grad or any(id(part) not in self._known for part in varying):
            self.has_gaps = True
            return evaluate_layer(stage, *inputs)
        fixed = stage._replace(
            dense=None if stage.dense is None else (stage.dense[0].detach(), stage.dense[1].detach()),
            updates=tuple(Update(scale, tensor.map(Tensor.detach)) for scale, tensor in stage.updates),
        )
        outputs = evaluate_layer(fixed, *inputs)
        for part in outputs.parts:
            if not part.requires_grad:
                part.requires_grad_()
        low, high, *sizes = stage.grid
        records.append(LayerRecord(stage, UniformGrid(low.clone(), high.clone(), *sizes), inputs, outputs))
        return outputs

    def _reaches_parameters(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graphs of the tensors lead to a parameter."""
        ends = [tensor for tensor in tensors if tensor.requires_grad]
        if not ends:
            return False
        ones = [torch.ones_like(end) for end in ends]
        found = torch.autograd.grad(ends, self.parameters, ones, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in found)

    def is_complete(self, values: Tensor) -> bool:
        """Whether a function's values depend on the parameters by nothing but the chains."""
        return bool(self.chains) and not self.has_gaps and not self._reaches_parameters([values])


def recording(parameters: Iterable[Tensor], rows: int) -> AbstractContextManager[Recorder]:
    """Records what this thread evaluates, see `Recorder`."""
    return observing(Recorder(parameters, rows))
