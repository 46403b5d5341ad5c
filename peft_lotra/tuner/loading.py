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

"""Which tensors of a state dict are those of an adapter: when they are loaded, and when they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..files.checkpoint import refuse
from .config import LoTRAConfig
from .layer import LoTRALayer, lotra_layers
from .targets import Target


_COMPONENTS = LoTRALayer.adapter_layer_names


def check_names(config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Compares the names in a file of tensors with those that the adapter has in this model."""
    if config.checkpoint.tensors is None or getattr(model, "_checkpoint_conversion_mapping", None):
        return  # not from a file, or the names in the file are older ones
    modules = dict(model.named_modules())
    adapted = {id(modules[name]) for name in targets}
    expected, allowed = set(), _embeddings(model)
    for name, module in model.named_modules(remove_duplicate=False):  # a shared layer has several names
        keys = []
        if id(module) in adapted:
            keys = _COMPONENTS
        elif any(name.endswith(ending) for ending in config.modules_to_save or ()):  # PEFT's own rule
            keys = list(getattr(module, "original_module", module).state_dict())
        (expected if name in modules else allowed).update(f"{name}.{key}" for key in keys)
    # PEFT 0.19 saves the components of all adapters, those of the others with their names; they are passed over
    allowed.update(name for name in config.checkpoint.tensors if _is_of_another_adapter(name))
    config.checkpoint.check_names(expected, allowed)


def _is_of_another_adapter(name: str) -> bool:
    return name.rpartition(".")[0].endswith(_COMPONENTS)


def mismatches(
    model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, list[str]], set[str]]:
    """The components in a state dict that have another shape, in words, by adapter; and the adapters in it."""
    wrong: dict[str, list[str]] = {}
    loaded: set[str] = set()
    for name, layer in lotra_layers(model):
        for component in _COMPONENTS:
            for adapter, parameter in getattr(layer, component).items():
                tensor = state_dict.get(f"{prefix}{name}.{component}.{adapter}")
                if tensor is None:
                    continue
                loaded.add(adapter)
                if tensor.shape != parameter.shape:
                    wrong.setdefault(adapter, []).append(
                        f"{name}.{component}: {tuple(tensor.shape)} in the checkpoint, {tuple(parameter.shape)} "
                        f"in the model, whose layer has the shape (out, in, basis) = {layer.lotra_tensor.shape}"
                    )
    return wrong, loaded


def select_to_load(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to load into an adapter that exists, without those of others, which PEFT 0.19 saves along."""
    layers = lotra_layers(model, adapter_name)
    own = {f"{name}.{component}.{adapter_name}" for name, _ in layers for component in _COMPONENTS}
    selected = {name: t for name, t in state_dict.items() if name in own or not _is_of_another_adapter(name)}
    base = model.state_dict().keys() - _embeddings(model)
    wrong = [f"{name} is missing" for name in sorted(own - state_dict.keys())]
    for name, tensor in selected.items():
        if name in own:
            wrong += [f"{name} has values that are not finite"] if not torch.isfinite(tensor).all() else []
        elif f".modules_to_save.{adapter_name}." not in name and name in base:
            wrong.append(f"{name} would be written over, which is no part of the adapter")
    refuse("The tensors are not those of the adapter, nothing was loaded:", wrong)
    return selected


def select_to_save(adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The components of an adapter in the state dict of its model, whole.

    PEFT looks for the names of the layers in the model, which the state dict does not have if FSDP wraps the layers.
    """
    endings = tuple(f".{component}.{adapter_name}" for component in _COMPONENTS)
    tensors = {key: value for key, value in state_dict.items() if key.endswith(endings)}
    for key, tensor in tensors.items():
        # FSDP has flat views of what this process holds, fully_shard DTensors
        whole = tensor.dim() == (3 if ".lotra_core." in key else 2)
        if not whole or hasattr(tensor, "placements") or hasattr(tensor, "local_shards"):
            raise ValueError(
                f"{key} is a part of a tensor, {tuple(tensor.shape)}, which is spread over several processes. "
                "Gather whole tensors on all of them, with torch.distributed.checkpoint.state_dict: `state_dict = "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, and pass them: "
                "`save_pretrained(folder, state_dict=state_dict)`. For accelerate and Trainer, set FSDP's "
                "`state_dict_type` to FULL_STATE_DICT."
            )
    return tensors


def _embeddings(model: nn.Module) -> set[str]:
    """The names of the embeddings of a transformers model, which PEFT can save along."""
    owners = []
    for which in ("input", "output"):
        with suppress(NotImplementedError):  # what transformers says of models without embeddings, such as KANModel
            owners.append(getattr(model, f"get_{which}_embeddings", lambda: None)())
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if any(module is owner for owner in owners)
        for key, _ in module.named_parameters()
    }
