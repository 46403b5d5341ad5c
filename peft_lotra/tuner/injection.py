# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How adapters come into a model and out of it again, and which tensors are theirs; also for PEFT's mixed models."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..families.slim import SlimLayer
from ..files.checkpoint import NORM_STATS, OF_THE_BASE, Checkpoint, is_of_another_adapter, refuse
from ..files.format import differ
from ..kan.slim_kan import SlimKANLinear
from ..modules.calls import modules_of, read_at_rest
from ..modules.checks import check_name
from .config import ALL_KAN, LoTRAConfig
from .guards import guard_network
from .layer import COMPONENTS, LoTRALayer, lotra_layers
from .norm_stats import NormStatsTuner, stats_in_place, stored_name
from .saved_modules import check_saved_modules, name_in_file
from .slim import SlimLoTRALayer
from .targets import (
    Target,
    check_base,
    check_nesting,
    check_parameters,
    check_trained,
    describe_targets,
    find_targets,
    locate_target,
    warn_of_large_adapters,
    write_targets,
)


_NORM_STATS = tuple(stored_name(name) for name in NORM_STATS)


def check_adapter_name(name: str) -> None:
    """Refuses a name that cannot be that of a parameter, of a folder, or of one adapter among others."""
    check_name(name)
    reason = None
    if "." in name:  # what nn.ParameterDict would say, but only when some layers are adapted already
        raise KeyError(f'The adapter name can\'t contain ".", got {name!r}.')
    if not name:
        reason = "the name is empty"
    elif name == "__base__":
        reason = "in `adapter_names` it stands for the base model"
    elif os.path.isabs(name) or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        reason = "adapters are saved in folders of their names"
    elif any(hasattr(holder(), name) for holder in (nn.ParameterDict, nn.ModuleDict)):
        reason = "the dicts of torch that hold adapters have a method or an attribute of this name"
    if reason:
        raise ValueError(f"An adapter cannot be called {name!r}: {reason}.")


_WRAPPED = ("base_layer", "original_module")  # what a wrapper of PEFT has of the model itself


def check_name_among_tensors(adapter_name: str, model: nn.Module, saves_modules: bool) -> None:
    """Refuses a name that PEFT, which takes the names of adapters out of those of tensors, could take for another.

    These are the names of parameters and buffers, and, where modules are saved whole, of modules.
    """
    holders: set[nn.Module] = set()
    modules = modules_of(model)
    saves_modules = saves_modules or any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules)
    taken = adapter_name in (*COMPONENTS, "base_layer", "base_model", "model", "modules_to_save", "original_module")
    for module in modules:
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            holders.update(part for key, part in module._modules.items() if part and key not in _WRAPPED)
        names = (module._parameters, module._buffers, *([module._modules] if saves_modules else []))
        taken = taken or module not in holders and any(adapter_name in entries for entries in names)
    if taken:
        raise ValueError(
            f"An adapter cannot be called {adapter_name!r}: the model has a module or a parameter of this name, and "
            "PEFT could not tell their tensors apart when it saves. Choose another `adapter_name`."
        )


def prepare_config(config: LoTRAConfig) -> LoTRAConfig:
    """Replaces the default of `target_modules`."""
    config.refuse_unresolved()
    if config.target_modules is None:
        config.target_modules = ALL_KAN
    return config


def prepare_targets(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    """Finds and checks all targets before the first of them is touched, and writes them into the configuration."""
    _check_task_type(config, model)
    with read_at_rest(model):
        targets = find_targets(config, model)
        check_nesting(model, targets)
        check_parameters(config.adapt_residual, model, targets)
        check_trained(config, targets)
    check_saved_modules(config, model, targets)
    write_targets(config, model, targets)
    config.base_layers = describe_targets(targets)
    check_base(config, model, targets)
    check_names(config.checkpoint, config, model, targets)
    if config.checkpoint.layers is None:
        warn_of_large_adapters(config, targets)
    return targets


def _check_task_type(config: LoTRAConfig, model: nn.Module) -> None:
    """Refuses a task whose class in PEFT calls what the model does not have."""
    if config.task_type not in MODEL_TYPE_TO_PEFT_MODEL_MAPPING:
        return
    problem = f"`task_type` is {config.task_type!r}, but the model"
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"{problem} does not generate: it has no `prepare_inputs_for_generation`. Leave `task_type` out."
        )
    arguments = inspect.signature(model.forward).parameters.values()
    takes_ids = any(argument.name == "input_ids" or argument.kind is argument.VAR_KEYWORD for argument in arguments)
    if not takes_ids or not hasattr(model, "config"):
        lacking = "has no `config`" if takes_ids else "takes no `input_ids`"
        raise ValueError(f"{problem} is not of this kind: it {lacking}. Leave `task_type` out.")


def create_and_replace(
    tuner: BaseTuner,
    targets: dict[str, Target],
    config: LoTRAConfig,
    adapter_name: str,
    module: nn.Module,
    name: str,
) -> None:
    """Adds an adapter to a module of this name: to a LoTRA layer, or by a new one around a KAN layer."""
    if name is None:
        raise ValueError("Current Key shouldn't be `None`")
    r, alpha = config.ranks_and_alpha(name)
    if isinstance(module, LoTRALayer):
        module.update_layer(adapter_name, r=r, alpha=alpha, config=config)
        return
    # PEFT takes other names than those of the configuration if it injects from a state dict
    layer, spec, coefficients = targets[name] if name in targets else locate_target(name, module)
    layer_cls = SlimLoTRALayer if isinstance(layer, (SlimKANLinear, SlimLayer)) else LoTRALayer
    new_module = layer_cls(layer, spec, adapter_name, config, r=r, alpha=alpha, coefficients=coefficients)
    if adapter_name not in tuner.active_adapters:
        # adding an additional adapter: it is not automatically trainable
        new_module.requires_grad_(False)
    replace_module(tuner.model, module, new_module)
    guard_network(tuner.model, name, spec)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module into every place of another one; a layer may be used in several.

    PEFT's own function would look for `.weight`, and would put one on the KAN layer when an adapter is unloaded.
    """
    for module in modules_of(model):
        for name, child in list(module._modules.items()):  # named_children() leaves out repetitions
            if child is old:
                setattr(module, name, new)


def check_names(checkpoint: Checkpoint, config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Compares the names in a file of tensors with those that an adapter of this config has in this model."""
    if checkpoint.tensors is None or getattr(model, "_checkpoint_conversion_mapping", None):
        return  # not from a file, or the names in the file are older ones
    modules = dict(model.named_modules())
    adapted = {id(modules[name]): COMPONENTS[: 1 + len(t.coefficients.shape)] for name, t in targets.items()}
    expected, allowed = set(), set()
    for name, module in model.named_modules(remove_duplicate=False):  # a shared layer has several names
        keys = []
        if id(module) in adapted:
            keys = adapted[id(module)]
        elif name.replace(".base_layer", "").endswith(tuple(config.modules_to_save or ())):  # PEFT's own rule
            keys = list(getattr(module, "original_module", module).state_dict())
            # what PEFT writes once more for an embedding, and loads nowhere
            allowed.update({f"{name}.modules_to_save.{key}" for key in keys} - model.state_dict().keys())
        stored = name_in_file(name, model, targets) if keys and id(module) not in adapted else name
        (expected if name in modules else allowed).update(f"{stored}.{key}" for key in keys)
    if config.save_norm_stats:
        allowed.update(map(stored_name, stats_in_place(model)))
    # PEFT 0.19 saves the components of all adapters, those of the others with their names; they are passed over
    allowed.update(name for name in checkpoint.tensors if is_of_another_adapter(name))
    checkpoint.check_names(expected, allowed)


def mismatches(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
    """What a state dict has in another shape or kind than adapters, in words."""
    return [
        f"{_without(adapter, name)}: {problem}{remark}"
        for name, adapter, expected, remark in _adapter_tensors(model)
        if isinstance(tensor := state_dict.get(prefix + name), Tensor) and (problem := differ(tensor, expected))
    ]


def refuse_without_memory(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Raises a ValueError if tensors would be copied to an adapter on the meta device, where they are lost.

    A base on the meta device is a model without values, of which the adapter is a part.
    """
    wrong = []
    for name, layer in lotra_layers(model):
        if any(value.is_meta for value in layer.get_base_layer().parameters()):
            continue
        for component in layer.adapter_layer_names:
            for adapter, value in getattr(layer, component).items():
                if value.is_meta and f"{prefix}{name}.{component}.{adapter}" in state_dict:
                    wrong.append(f"{name}.{component} of the adapter {adapter!r} is on the meta device")
    remedy = "Adapters that were made with `low_cpu_mem_usage=True` are loaded with it, too."
    refuse("The tensors cannot be copied, nothing was loaded:", wrong, remedy)


def name_twice(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Adds components of a layer that a model has under several names under each of them; a file may have the first.

    Otherwise PEFT warns that they are missing.
    """
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoTRALayer) and names.setdefault(module, name) != name:
            for component in module.adapter_layer_names:
                for adapter in getattr(module, component):
                    tensor = state_dict.get(f"{prefix}{names[module]}.{component}.{adapter}")
                    if tensor is not None:
                        state_dict.setdefault(f"{prefix}{name}.{component}.{adapter}", tensor)


def cast_to_adapters(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Casts floating tensors of a state dict to the dtypes of the adapters, which assigning them would replace.

    PEFT assigns with `low_cpu_mem_usage`: modules that are saved whole would have the dtype of the file.
    """
    for name, _, expected, _ in _adapter_tensors(model):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != expected.dtype:
            state_dict[prefix + name] = tensor.to(expected.dtype)


def _without(adapter: str, name: str) -> str:
    """The name of a tensor as a file has it."""
    return name.removesuffix(f".{adapter}").replace(f".modules_to_save.{adapter}.", ".")


def _adapter_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor, str]]:
    """The tensors of all adapters: name, adapter, tensor, and what an error says of its layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoTRALayer):
            remark = f", whose layer has the shape (out, in, basis) = {module.lotra_tensor.shape}"
            for component in module.adapter_layer_names:
                for adapter, parameter in getattr(module, component).items():
                    yield f"{name}.{component}.{adapter}", adapter, parameter, remark
        elif isinstance(module, ModulesToSaveWrapper):
            for adapter, saved in module.modules_to_save.items():
                for key, value in saved.state_dict(keep_vars=True).items():
                    if isinstance(value, Tensor):
                        yield f"{name}.modules_to_save.{adapter}.{key}", adapter, value, ""


def refuse_no_tensors(state_dict: Mapping[Any, Any]) -> None:
    """Raises a ValueError if a state dict has other entries than dense tensors by name."""
    wrong = []
    for name, value in state_dict.items():
        if not isinstance(name, str):
            wrong.append(f"{name!r} is no name")
        elif not isinstance(value, Tensor):
            wrong.append(f"{name} is of type {type(value).__name__}")
        elif value.is_meta or value.is_quantized or value.layout != torch.strided:
            wrong.append(f"{name} is {'without values, on the meta device' if value.is_meta else 'not dense'}")
    refuse("The state dict must have dense tensors by name, nothing was loaded:", wrong)


def select_to_load(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to load into an adapter that exists, without those of others, which PEFT 0.19 saves along."""
    layers = lotra_layers(model, adapter_name)
    own = {f"{name}.{component}.{adapter_name}" for name, layer in layers for component in layer.adapter_layer_names}
    stats = {name for name in state_dict if name.endswith(tuple(f".{key}.{adapter_name}" for key in _NORM_STATS))}
    if stats and not any(isinstance(module, NormStatsTuner) for module in model.modules()):
        raise ValueError(
            "The adapter has running statistics of normalizations, which only a `PeftModel` keeps apart from those of "
            "the base: load it by `PeftModel.from_pretrained`. Nothing was loaded."
        )
    own_and_stats = own | stats
    selected = {name: t for name, t in state_dict.items() if name in own_and_stats or not is_of_another_adapter(name)}
    base = model.state_dict().keys()
    wrong = [f"{name} is missing" for name in sorted(own - state_dict.keys())]
    for name, tensor in selected.items():
        if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
            wrong.append(f"{_without(adapter_name, name)} has values that are not finite")
        if name not in own_and_stats and f".modules_to_save.{adapter_name}." not in name and name in base:
            wrong.append(f"{name} would be written over, which is no part of the adapter ({OF_THE_BASE})")
    refuse("The tensors are not those of the adapter, nothing was loaded:", wrong)
    return selected


def select_to_save(adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The components of an adapter in a state dict, whole; what is of the base is taken out of the dict.

    PEFT looks for the names of the layers in the model, which the state dict does not have if FSDP wraps the layers.
    """
    endings = tuple(f".{key}.{adapter_name}" for key in (*COMPONENTS, *_NORM_STATS))
    # PEFT would go on to write embeddings that were resized, or that `save_embedding_layers` asks for
    for key in [key for key in state_dict if not key.endswith(endings) and ".modules_to_save." not in key]:
        del state_dict[key]
    tensors = {key: value for key, value in state_dict.items() if key.endswith(endings)}
    for key, tensor in tensors.items():
        # FSDP has flat views of what this process holds, fully_shard DTensors
        sizes = {"lotra_core": (3, 4), **dict.fromkeys(COMPONENTS[1:], (2,))}
        whole = tensor.dim() in sizes.get(key.split(".")[-2], (tensor.dim(),))
        if not whole or hasattr(tensor, "placements") or hasattr(tensor, "local_shards"):
            raise ValueError(
                f"{key} is a part of a tensor, {tuple(tensor.shape)}, which is spread over several processes. "
                "Gather whole tensors on all of them, with torch.distributed.checkpoint.state_dict: `state_dict = "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, and pass them: "
                "`save_pretrained(folder, state_dict=state_dict)`. For accelerate and Trainer, set FSDP's "
                "`state_dict_type` to FULL_STATE_DICT."
            )
    return tensors
