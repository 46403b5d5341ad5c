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

"""The universal path of an adapted layer: the base layer itself runs, with `parameter + update` as its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..functional import call_with_parameters
from ..tucker import Update


def run_base(base_layer: nn.Module, parameters: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs the base layer with the given tensors in the place of its parameters."""
    if not parameters:
        return base_layer(*args, **kwargs)
    return call_with_parameters(base_layer, parameters, base_layer, args, kwargs)


def without_autocast(updates: Sequence[Update]) -> Any:
    """A context in which an update keeps its digits: by autocast it would have three, beside a parameter's seven."""
    return torch.autocast(updates[0].tensor.core.device.type, enabled=False) if updates else nullcontext()


def add_updates(
    tensor: CoefficientTensor, base_layer: nn.Module, updates: Sequence[Update]
) -> dict[str, torch.Tensor]:
    """The adapted parameters, as stored, with the updates added, by name; without those that no update reaches.

    Raises:
        RuntimeError: A parameter is sharded, and the updates are not, or it is parametrized.
    """
    parameters: dict[str, torch.Tensor] = {}
    with without_autocast(updates):
        for update in updates:
            parts = tensor.split(update.dense())
            stored = are_stored(base_layer, parts)
            for name, part in parts.items():
                parameter = parameters[name] if name in parameters else attrgetter(name)(base_layer)
                in_parts = hasattr(parameter, "placements") != hasattr(part, "placements")  # a DTensor
                if not stored or in_parts or parameter.shape != part.shape:
                    raise RuntimeError(
                        f"`{name}` of the base layer is sharded or parametrized, and its adapters are not. Shard the "
                        "LoTRALayer, or a module around it (FSDP, fully_shard), but not the base layer inside; remove "
                        "parametrizations first."
                    )
                parameters[name] = torch.add(parameter, part).to(parameter.dtype)
    return parameters


def are_stored(layer: nn.Module, names: Iterable[str]) -> bool:
    """Whether parameters are stored (by FSDP in `__dict__`), and not computed at each read (parametrizations)."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(path) if path else layer
        if attribute not in owner._parameters and attribute not in owner.__dict__:
            return False
    return True
