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

"""Records of what passes through KAN layers, of which the gradients of single rows can be made.

A residual function is evaluated once, on all rows. Whatever networks of KAN layers it evaluates, by `jet` or by a
forward pass, run with their parameters detached, and hand it outputs that are leaves of its graph; the records say how
to get from gradients in these to gradients in the parameters (see `optim/row_gradients.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tucker import Update
from .product import needs_plain_operations


Parts = tuple[Tensor | None, ...]  # y, y' and y'', or z, z' and z''; None for what is not wanted or zero


@dataclass
class Grid:
    """The grid of a layer at the time that it is evaluated."""

    grid_bounds: Tensor
    grid_size: int
    spline_order: int


@dataclass
class LayerRecord:
    """
    One evaluation of a KAN layer.

    Attributes:
        grid: of the layer.
        dense: its spline_weight (O, I, K) and base_weight (O, I), or None for a Slim layer.
        updates: the Tucker tensors in force, scaled.
        inputs: z, z', z'', weights and only_second, as `through_layer` has them.
        outputs: y, y' and y'', of a graph that reaches back to the outputs of the records before.
    """

    grid: Grid
    dense: tuple[Tensor, Tensor] | None
    updates: list[Update]
    inputs: tuple
    outputs: Parts


@dataclass
class Chain:
    """One evaluation of a network: its records, its outputs, and the leaves that the function got in their place."""

    records: list[LayerRecord]
    outputs: Parts = ()
    leaves: Parts = ()


class Recorder:
    """
    What a function does with KANs.

    Args:
        parameters: leaves that stand in the place of the trainable parameters. A layer's coefficients are known by
            being one of them, not a copy.
        rows: how many rows the function is evaluated on.

    Attributes:
        chains: the networks evaluated.
        refused: whether there was something of which records make no account: they must not be used.
    """

    def __init__(self, parameters: Iterable[Tensor], rows: int) -> None:
        self.parameters = list(parameters)
        self.rows = rows
        self.chains: list[Chain] = []
        self.refused = False
        self._known = {id(parameter) for parameter in self.parameters}
        self._open: Chain | None = None

    def takes(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether a network is recorded at inputs x, derivatives being along and weighted by `others`. Where not, it
        runs as usual, with the parameters in its graph."""
        return (
            torch.is_grad_enabled()
            and x.dim() == 2
            and len(x) == self.rows
            and not needs_plain_operations(x)
            and not any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
        )

    def chain(self, through: Callable[..., Parts], *inputs: Tensor | None) -> Parts:
        """Records the layers that a function of the inputs goes through; returns its outputs, as leaves.

        Inputs and leaves are copies: what the caller writes into its own tensors later must not change the records.
        """
        chain = self._open = Chain([])
        try:
            chain.outputs = through(*(None if part is None else part.clone() for part in inputs))
        finally:
            self._open = None
        if self.reaches_parameters(*chain.outputs):
            self.refused = True  # of a normalisation, for example
        chain.leaves = tuple(
            None if part is None else part.detach().clone().requires_grad_() for part in chain.outputs
        )
        self.chains.append(chain)
        return chain.leaves

    def reaches_parameters(self, *tensors: Tensor | None) -> bool:
        """Whether the graphs of the tensors lead to a parameter."""
        ends = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        if not ends:
            return False
        ones = [torch.ones_like(end) for end in ends]
        found = torch.autograd.grad(ends, self.parameters, ones, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in found)

    def explains(self, values: Tensor) -> bool:
        """Whether a function's values depend on the parameters by nothing but the chains."""
        return bool(self.chains) and not self.refused and not self.reaches_parameters(values)

    def layer(
        self, layer: nn.Module, dense: tuple | None, updates: list[Update], inputs: tuple, evaluate: Callable
    ) -> Parts:
        """The outputs `evaluate(layer, dense, updates, *inputs)` of a layer of the chain that is open."""
        components = [part for update in updates for part in (update.scale, *update.tensor)]
        varying = [part for part in (*(dense or ()), *components) if isinstance(part, Tensor) and part.requires_grad]
        if not varying:
            return evaluate(layer, dense, updates, *inputs)
        if layer.grid_bounds.requires_grad or any(id(part) not in self._known for part in varying):
            self.refused = True
            return evaluate(layer, dense, updates, *inputs)
        fixed = None if dense is None else tuple(part.detach() for part in dense)
        fixed_updates = [Update(scale, tensor.map(Tensor.detach)) for scale, tensor in updates]
        outputs = evaluate(layer, fixed, fixed_updates, *inputs)
        for part in outputs:
            if part is not None and not part.requires_grad:
                part.requires_grad_()
        grid = Grid(layer.grid_bounds.clone(), layer.grid_size, layer.spline_order)
        self._open.records.append(LayerRecord(grid, dense, updates, inputs, outputs))
        return outputs


class _State(threading.local):
    recorder: Recorder | None = None


_state = _State()


@contextmanager
def recording(parameters: Iterable[Tensor], rows: int) -> Iterator[Recorder]:
    """Records what this thread evaluates; see `Recorder`."""
    before, _state.recorder = _state.recorder, Recorder(parameters, rows)
    try:
        yield _state.recorder
    finally:
        _state.recorder = before


def active_recorder() -> Recorder | None:
    """The recorder of this thread. Compiled graphs have none."""
    return None if torch.compiler.is_compiling() else _state.recorder


def recorder_of_layer() -> Recorder | None:
    """The same, where a network is being recorded."""
    recorder = active_recorder()
    return recorder if recorder is not None and recorder._open is not None else None
