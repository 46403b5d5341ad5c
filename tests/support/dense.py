# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The dense reference of the oracle: bases to whose parameters the updates of adapters were added, as full tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import lotra_layers
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close


ALPHA = 0.7
# one for each combination of full modes and factors that the package treats differently
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"r": (2, 1, 3)},
    "shape": {"r": ("full", "full", 1)},
    "dense": {"r": "full"},
    "splines": {"r": (1, 2, 2), "adapt_residual": False},
    "outputs": {"r": ("full", 2, "full")},
    "inputs": {"r": (2, "full", "full"), "adapt_residual": False},
}


def near(actual: Any, expected: Any, bound: float = 1e-9) -> None:
    assert_close(actual, expected, rtol=bound, atol=bound)


def dense_update(layer: Any, adapter: str = "default", scale: float = ALPHA) -> Tensor:
    """Return the update of an adapter, (out, in, basis [, kernel])."""
    update, *factors = layer.get_components(adapter)
    for mode, factor in enumerate(factors[: update.dim()]):
        if factor is not None:
            update = torch.tensordot(update, factor, ([mode], [1])).movedim(-1, mode)
    return scale * update


def dense_parameters(base: nn.Module, *adapters: tuple[PeftModel, str, float]) -> dict[str, Tensor]:
    """Return the parameters of a base with the updates of adapters, each a model, a name and a scale, added."""
    first, _, _ = adapters[0]
    layouts = {name: layer.lotra_tensor for name, layer in lotra_layers(first).items()}
    parameters = dict(base.named_parameters())
    for model, adapter, scale in adapters:
        for name, layer in lotra_layers(model).items():
            if adapter not in layer.lotra_r:
                continue
            update = dense_update(layer, adapter, scale).to(layouts[name].get_parameter(layer.get_base_layer()).dtype)
            prefix = name.removeprefix("base_model.model.").removeprefix("base_model.model")
            for parameter, part in layouts[name].split(update).items():
                path = f"{prefix}.{parameter}".lstrip(".")
                parameters[path] = parameters[path] + part
    return parameters


def dense(base: nn.Module, *adapters: PeftModel | tuple[PeftModel, str, float]) -> nn.Module:
    """Return the base in evaluation mode with the dense updates of adapted models added to its parameters."""
    total = copy.deepcopy(base)
    full = [adapter if isinstance(adapter, tuple) else (adapter, "default", ALPHA) for adapter in adapters]
    if full:
        with torch.no_grad():
            for name, value in dense_parameters(total, *full).items():
                total.get_parameter(name).data = value.detach().clone()
    return total.eval()
