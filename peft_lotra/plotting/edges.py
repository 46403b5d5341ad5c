# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How much an adapter changed the function on each edge, by its effect on the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..compress.data_weights import Inputs, functions_at, probe_derivatives, run_recorded
from ..compress.updates import edge_scales
from ..layers.describe import is_linear
from ..layers.registry import Grid
from ..modules.calls import unwrap
from ..modules.report import Report, TextTable
from ..tuner.layer import LoTRALayer, Target, grid_ends, lotra_layers, warn_of_far_inputs


ROWS = 1000  # inputs that are looked at, at most
PROBES = 8  # directions of the outputs whose derivatives are taken, at most
CHUNK = 2**24  # values of edge functions that are computed at once


class EdgeChange(NamedTuple):
    """How much the active adapters changed the function on one edge.

    Attributes:
        layer: The name of the layer.
        output, input: The ends of the edge: the units after and before the layer.
        effect: What the change of the function adds to the outputs of the network, a root mean square over inputs and
            outputs. It is linearized behind the layer, and leaves out the constant part of the change.
        share: effect^2, as a share of its sum over all edges.
        layer_effect: What the change adds to this output of the layer, a root mean square without the constant part.
        shift: The constant part: the mean change of the function.
    """

    layer: str
    output: int
    input: int
    effect: float
    share: float
    layer_effect: float
    shift: float


class EdgeChanges(Report, list[EdgeChange]):
    """A list of `EdgeChange`, the largest effect first; prints as a table of the first ten."""

    def _table(self) -> TextTable:
        columns = ["layer", ">output", ">input", ">effect", ">share", ">in the layer", ">shift"]
        rows = []
        for edge in self[:10]:
            numbers = [f"{edge.effect:.3g}", f"{edge.share:.1%}", f"{edge.layer_effect:.3g}", f"{edge.shift:+.3g}"]
            rows.append([edge.layer, str(edge.output), str(edge.input), *numbers])
        notes = [f"the {len(rows)} of {len(self):,} edges with the largest effect"] if len(rows) < len(self) else []
        return TextTable(columns, rows, notes)


class LayerChange(NamedTuple):
    """The effects and the shifts of all edges of a layer, (out, in), and the inputs of the layer, (rows, in)."""

    effect: Tensor
    layer_effect: Tensor
    shift: Tensor
    inputs: Tensor


def edge_changes(model: nn.Module, inputs: Inputs | None = None) -> EdgeChanges:
    r"""Measures how much the active adapters changed each edge, by the effect on the outputs of the network.

    The change of the function on the edge from unit i to unit o of a layer, d(z) = (A' - A)[o, i, :] . phi(z), is
    evaluated at the units z_i that the inputs reach. Its effect is

        effect^2 = mean over rows and outputs p of (df_p/dy_o (d(z_i) - mean d))^2,

    where y are the outputs of the layer and f those of the network. An edge whose function was almost zero leads the
    list only if its change matters.

    Args:
        model: The adapted model. It stays unchanged.
        inputs: Inputs of the network (rows, in), of which up to 1,000 are used, or what a call of it takes: a tuple, a
            dict, or a function that runs the model. By default 1,000 points spread evenly over the grid of the first
            adapted layer.

    Returns:
        The edges of all dense KAN layers with an active adapter, the largest effect first. Merged and disabled
        adapters do not count.

    Raises:
        ValueError: No dense KAN layer has an active adapter, or the model cannot be run on these inputs.

    Warns:
        UserWarning: Most inputs of a layer lie far outside of its grid.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 5, 3]), LoTRAConfig(r=2, init_weights=False))
        >>> changes = edge_changes(model, torch.rand(100, 2))
        >>> len(changes), round(sum(edge.share for edge in changes), 3)
        (25, 1.0)
    """
    layers = layer_changes(model, inputs)
    total = sum(layer.effect.square().sum().item() for layer in layers.values()) or 1.0
    changes = EdgeChanges()
    for name, layer in layers.items():
        columns = [values.flatten().tolist() for values in layer[:3]]
        for place, (effect, layer_effect, shift) in enumerate(zip(*columns, strict=True)):
            output, index = divmod(place, layer.effect.shape[1])
            share = effect**2 / total
            changes.append(EdgeChange(name, output, index, effect, share, layer_effect, shift))
    changes.sort(key=lambda edge: -edge.effect)
    return changes


def layer_changes(model: nn.Module, inputs: Inputs | None = None) -> dict[str, LayerChange]:
    """Compute the changes of all edges by layer, see `edge_changes`."""
    layers = dict(_adapted_layers(model))
    if not layers:
        raise ValueError(
            "The model has no dense KAN layer with an active adapter. Adapters that are merged (`unmerge_adapter`), "
            "disabled (`enable_adapter_layers`) or not active (`set_adapter`) do not count, nor do convolutions."
        )
    x = _grid_points(next(iter(layers.values()))) if inputs is None else inputs
    if isinstance(x, Tensor) and len(x) > ROWS:
        x = x[torch.linspace(0, len(x) - 1, ROWS).long()]
    try:
        result, received, returned = run_recorded(model, layers, x)
    except (RuntimeError, IndexError, ValueError) as error:
        kind = "points on the grid of its first layer: pass `inputs`" if inputs is None else "these `inputs`"
        raise ValueError(f"The model cannot be run on {kind}. {error}") from error
    squares = {name: x.new_zeros(len(x), 1).double() for name, x in received.items()}
    probes = min(PROBES, result.shape[-1])
    for name, derivative in probe_derivatives(result, returned, probes):
        squares[name] = squares[name] + derivative.square() * len(derivative) / (probes * result.numel())
    return {name: measure_layer(name, layer, received[name], squares[name]) for name, layer in layers.items()}


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoTRALayer]]:
    """Yield the dense layers with an active adapter, and their names."""
    for name, layer in lotra_layers(unwrap(model)):
        target = Target(layer.get_base_layer(), layer.lotra_spec, layer.lotra_tensor)
        if layer.applied_updates() and len(target.tensor.shape) == 3 and is_linear(*target):
            yield name, layer


def _grid_points(layer: LoTRALayer) -> Tensor:
    """Return points spread evenly over the grid of a layer, (ROWS, in); over [-1, 1] if it has none."""
    _, width, _ = layer.lotra_tensor.shape
    points = torch.quasirandom.SobolEngine(width, scramble=True, seed=0).draw(ROWS)
    low, high = grid_range(layer.lotra_spec.read_grid(layer.get_base_layer()), layer.lotra_tensor.shape)
    return torch.lerp(low.to(points), high.to(points), points).to(layer.get_base_weight())


def grid_range(grid: Grid, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return both ends (in,) of the grid of each input of a layer (out, in, basis), -1 and 1 if it has none."""
    ends = grid_ends(grid, shape)
    return (-torch.ones(shape[1]), torch.ones(shape[1])) if ends is None else ends


@torch.no_grad()
def measure_layer(name: str, layer: LoTRALayer, z: Tensor | None = None, squares: Tensor | None = None) -> LayerChange:
    """Compute the change of a layer whose inputs are z, (rows, in); by default points on its grid.

    `squares` (rows, out) are the mean squares of the derivatives of the outputs of the network.
    """
    base, spec, tensor = layer.get_base_layer(), layer.lotra_spec, layer.lotra_tensor
    z = _grid_points(layer) if z is None else z
    squares = z.new_ones(len(z), 1) if squares is None else squares
    warn_of_far_inputs(name, spec.read_grid(base), tensor.shape, z)
    before = layer.get_base_weight().double()
    change = layer.effective_coefficients(torch.float64) - before
    scale = edge_scales(Target(base, spec, tensor), before)
    if scale is not None:
        change *= scale
    functions = functions_at(base, spec, tensor, z).double()[..., : change.shape[2]]
    shift = torch.einsum("ik,oik->oi", functions.mean(0), change)
    effect = torch.zeros_like(shift)
    layer_effect = torch.zeros_like(shift)
    size = max(1, CHUNK // shift.numel())
    for values, weights in zip(functions.split(size), squares.double().split(size), strict=True):
        moved = (torch.einsum("nik,oik->noi", values, change) - shift).square()
        effect += (weights.unsqueeze(2) * moved).sum(0)
        layer_effect += moved.sum(0)
    effect, layer_effect = (total.div(len(z)).sqrt().cpu() for total in (effect, layer_effect))
    return LayerChange(effect, layer_effect, shift.cpu(), z.cpu())
