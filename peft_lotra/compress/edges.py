# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How much an adapter changed the function on each edge, by its effect on the outputs."""

from __future__ import annotations

from itertools import product
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules.calls import unwrap
from ..tuner.layer import LoTRALayer, Target, lotra_layers
from ..tuner.targets import locate_target
from .data_weights import Inputs, edge_values, sample_layers
from .updates import read_coefficients


ROWS = 1000  # inputs that are looked at, at most
PROBES = 2  # random directions of the outputs whose derivatives are taken; all rows average over them
CACHED = 250_000  # values that are computed at a time


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


class LayerChange(NamedTuple):
    """The effects and the shifts of all edges of a layer, (out, in)."""

    effect: Tensor
    layer_effect: Tensor
    shift: Tensor


def edge_changes(model: nn.Module, inputs: Inputs) -> list[EdgeChange]:
    r"""Measure how much the active adapters changed each edge of the dense KAN layers, the largest effect first.

    The change of the function on the edge from unit i to unit o of a layer, d(z) = (A' - A)[o, i, :] . phi(z), is
    evaluated at the units z_i that the inputs reach. Its effect is

        effect^2 = mean over rows and outputs p of (df_p/dy_o (d(z_i) - mean d))^2,

    where y are the outputs of the layer and f the outputs of the network. An edge whose function was almost zero
    leads the list only if its change matters.
    """
    layers = layer_changes(model, inputs)
    total = sum(float(change.effect.square().sum()) for change in layers.values()) or 1.0
    edges = []
    for name, change in layers.items():
        outputs, width = change.effect.shape
        effect, layer_effect, shift = (values.flatten() for values in change)
        share = effect.square() / total
        columns = [values.tolist() for values in (effect, share, layer_effect, shift)]
        ends = product(range(outputs), range(width))
        for (output, index), *values in zip(ends, *columns, strict=True):
            edges.append(EdgeChange(name, output, index, *values))
    return sorted(edges, key=attrgetter("effect"), reverse=True)


@torch.no_grad()
def layer_changes(model: nn.Module, inputs: Inputs) -> dict[str, LayerChange]:
    """Compute the changes of all edges by layer, see `edge_changes`."""
    layers = {name: layer for name, layer in lotra_layers(unwrap(model)) if layer.applied_updates()}
    if isinstance(inputs, Tensor) and len(inputs) > ROWS:
        numbers = torch.linspace(0, len(inputs) - 1, ROWS, dtype=torch.float64, device=inputs.device)
        inputs = inputs[numbers.long()]
    changes = {}
    samples = sample_layers(model, layers, inputs, torch.square, PROBES)
    for name, (x, functions, squares) in samples.items():
        _, change = edge_coefficients(name, layers[name])
        target = locate_target(name, layers[name])
        changes[name] = measure_change(target, x, functions, change, squares)
    return changes


def edge_coefficients(name: str, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the coefficients (out, in, basis) of the base, and their change by the active adapters.

    Both are times the scales of the edges, in float64.

    Raises:
        ValueError: The coefficients or their change are not finite.
    """
    # of an adapted layer, not of its base: there, all parameters are frozen, as constants are
    coefficients, scale = read_coefficients(name, module)
    change = torch.zeros_like(coefficients)
    if isinstance(module, LoTRALayer):
        module.add_updates(change)
    base = coefficients - change
    if not change.isfinite().all():
        raise ValueError(f"The update of `{name}` has NaN or infinite values.")
    if scale is not None:
        base *= scale
        change *= scale
    return base, change


def measure_change(
    target: Target,
    x: Tensor,
    functions: Tensor | None,
    change: Tensor,
    squares: Tensor | None = None,
) -> LayerChange:
    """Compute the effects of a change (out, in, basis) of the coefficients of a layer.

    Args:
        target: The layer.
        x: Its inputs (rows, in).
        functions: Its basis functions (rows, in, basis) there; None if they differ between the outputs.
        change: The change of the coefficients.
        squares: The squared derivatives (rows, out) of the outputs of the network, divided by their number.
    """
    if functions is None:
        values = edge_values(target, change, x)
        return _measure_values(values, squares)
    change = change.to(functions)
    rows = len(functions)
    out = len(change)
    mean = functions.mean(0)
    shift = torch.einsum("ik,oik->oi", mean, change)
    if squares is None:
        squares = functions.new_zeros(rows, 1)
    weights = squares.T.contiguous()  # (out, rows)

    effects = []
    variances = []
    # all edges at once would not fit into the cache
    count = max(1, CACHED // (rows * out))
    for start in range(0, len(mean), count):
        block = slice(start, start + count)
        centered = functions[:, block] - mean[block]
        coefficients = change[:, block].transpose(0, 1)
        moved = coefficients @ centered.permute(1, 2, 0)  # (in, out, rows)
        moved.square_()
        variances.append(moved.mean(-1))
        effects.append(moved.mul_(weights).sum(-1))
    effect = torch.cat(effects).T.sqrt()
    layer_effect = torch.cat(variances).T.sqrt()
    return LayerChange(effect.cpu(), layer_effect.cpu(), shift.cpu())


def _measure_values(values: Tensor, squares: Tensor | None) -> LayerChange:
    """As `measure_change`, of the changes (rows, out, in) of the functions at the inputs of the layer."""
    shift = values.mean(0)
    moved = (values - shift).square()
    layer_effect = moved.mean(0).sqrt()
    if squares is None:
        squares = values.new_zeros(1, 1)
    effect = (moved * squares.unsqueeze(-1)).sum(0).sqrt()
    return LayerChange(effect.cpu(), layer_effect.cpu(), shift.cpu())
