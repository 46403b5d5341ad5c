# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Changes of the coefficients of a network by fine-tuning."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layers.search import walk_kan_layers
from ..modules.calls import read_at_rest, unwrap
from ..tuner.layer import LoTRALayer
from ..tuner.targets import locate_target


LayerRanks = dict[str, tuple[int, ...]]  # the ranks of each mode, by layer


class CoefficientUpdate(NamedTuple):
    """The change of the coefficients (out, in, basis [+ 1] [, kernel]) of one layer by fine-tuning, in float64.

    With a `scale`, the scales of the base layer's edges, it is the change of coefficient times scale.
    """

    tensor: Tensor
    scale: Tensor | None = None


def check_without_adapters(model: nn.Module, argument: str) -> None:
    """Raise a ValueError if a model has adapters of PEFT."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"`{argument}` has adapters: merge them first, `model = model.merge_and_unload()`.")


@torch.no_grad()
def coefficient_updates(
    base: nn.Module,
    tuned: nn.Module,
    scaled: bool = False,
) -> dict[str, CoefficientUpdate]:
    """Compute the updates of all KAN layers, by name; raise a ValueError as `update_spectrum`.

    With `scaled`, updates of edges with scales are of coefficient times scale even if no scale changed.
    """
    base = unwrap(base)
    tuned = unwrap(tuned)
    layers = _list_layers(base)
    for first, second in zip_longest(layers, _list_layers(tuned)):
        if first != second:
            raise ValueError(
                f"The models have different architectures. Their first KAN layer that differs: {first} in the base "
                f"model, {second} in the tuned one."
            )
    if not layers:
        raise ValueError("No KAN layer was found in the models, see `find_kan_layers` and `register_kan_layer`.")

    updates = {}
    for name, *_ in layers:
        coefficients, scale = read_coefficients(name, base.get_submodule(name))
        tuned_coefficients, tuned_scale = read_coefficients(name, tuned.get_submodule(name))
        if scale is None or tuned_scale is None:
            scale = None
        elif scaled or not torch.equal(scale, tuned_scale.to(scale)):
            coefficients *= scale
            tuned_coefficients *= tuned_scale
        else:
            scale = None
        updates[name] = CoefficientUpdate(tuned_coefficients.to(coefficients) - coefficients, scale)
    return updates


def _list_layers(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the name, kind, shape and parameters of each KAN layer."""
    layers = []
    with read_at_rest(model):
        for name, layer, spec in walk_kan_layers(model):
            tensor = spec.locate(layer)
            layers.append((name, spec.kind, tensor.shape, *tensor.parameters))
    return layers


def read_coefficients(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Read coefficients, with active adapters, and scales of the edges, (out, in, basis [+ 1] [, kernel]), in float64.

    The scales are None for a layer without them, and 1 for the base branch. Raise a ValueError for values that
    are not finite.
    """
    with read_at_rest(module):
        target = locate_target(name, module)
        if isinstance(module, LoTRALayer):
            coefficients = module.effective_coefficients(torch.float64)
        else:
            # a copy, since `read` may return the parameter itself
            coefficients = target.tensor.read(target.layer).to(torch.float64, copy=True)
        edge_scale = target.spec.read_edge_scale(target.layer, target.tensor)
    if coefficients.is_meta or not coefficients.isfinite().all():
        raise ValueError(f"The coefficients of `{name}` are not finite, or not loaded (on the meta device).")
    if edge_scale is None:
        return coefficients, None
    scale = torch.ones_like(coefficients)
    scale[:, :, : target.tensor.shape[2]] = edge_scale.to(coefficients)
    return coefficients, scale
