# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Checks of a model before its training, and after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..kan.layer import SplineLayer
from .constraints import HardConstraint, Part


OUTSIDE = 0.01  # share of activations outside of a grid; a larger one warns


@torch.no_grad()
def count_outputs(x: Tensor, *parts: Part) -> int:
    """Return the number of unknown functions: the largest number of columns of `distance` and `lift`."""
    count = 1
    for part in parts:
        if callable(part):
            values = part(x[:2])
            if values.dim() == 2:  # else, the model raises an error
                count = max(count, values.shape[1])
    return count


@torch.no_grad()
def check_model(
    model: HardConstraint,
    x: Tensor,
    sides: Sequence[Tensor],
    has_terms: bool,
) -> int:
    """Return the number of outputs.

    Raises:
        ValueError: `distance` is zero everywhere, or on no side while there are no terms.
    """
    outputs = model(x[:2]).shape[-1]

    def largest_distance(points: Tensor) -> Tensor:
        distance = model.part("distance", points, model.kan(points))
        return distance.abs().amax(0)

    size = largest_distance(x)
    if not size.any():
        raise ValueError(
            "`distance` is zero everywhere, so the solution is `lift`. Without exact conditions, pass 1.0."
        )
    has_zero = any((largest_distance(side) <= 1e-6 * size).any() for side in sides)
    if not has_terms and not has_zero:
        raise ValueError(
            "`distance` is zero on no side of the box, or not on all of the boundary of `inside`. Take `BoxDistance` "
            "or the `distance` of a region, or give `terms` for conditions."
        )
    return outputs


@torch.no_grad()
def layer_inputs(model: nn.Module, x: Tensor, layer: nn.Module) -> Tensor:
    """Return the inputs of a layer of the model."""
    inputs: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        model(x)
    return inputs[0]


def outside_grids(model: nn.Module, x: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the layers with activations outside of their grids, and the share of these."""
    for name, layer in model.named_modules():
        if not isinstance(layer, SplineLayer):
            continue
        low, high = layer.grid_bounds.unbind(-1)
        slack = 1e-6 * (high - low)
        z = layer_inputs(model, x, layer)
        is_outside = (z < low - slack) | (z > high + slack)
        share = is_outside.double().mean().item()
        if share > OUTSIDE:
            yield name, share
