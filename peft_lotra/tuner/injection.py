# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How adapters come into a model and out of it again, and which tensors are theirs; also for PEFT's mixed models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..families.slim import SlimLayer
from ..files.checkpoint import OF_THE_BASE, refuse
from ..kan.slim_kan import SlimKANLinear
from .config import ALL_KAN, LoTRAConfig
from .guards import guard_network, release_networks
from .layer import COMPONENTS, LoTRALayer, lotra_layers
from .slim import SlimLoTRALayer
from .targets import Target, check_base, check_parameters, describe_targets, find_targets, locate_target


def prepare_config(config: LoTRAConfig) -> LoTRAConfig:
    """Replaces the default of `target_modules`."""
    config.refuse_unresolved()
    if config.target_modules is None:
        config.target_modules = ALL_KAN
    return config


def prepare_targets(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    """Finds and checks all targets before the first of them is touched, and writes them into the configuration."""
    _check_task_type(config, model)
    targets = find_targets(config, model)
    check_parameters(config, model, targets)
    if config.targets_all_kan:
        config.target_modules = set(targets)
    config.base_layers = describe_targets(targets)
    check_base(config, model, targets)
    check_names(config, model, targets)
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
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() leaves out repetitions
            if child is old:
                setattr(module, name, new)


@contextmanager
def transaction(model: nn.Module, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
    """Puts a model back as it was, with these of its tensors, if what is done within is not finished."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents = [(v, v.copy()) for _, old in attributes for v in old.values() if type(v) in (dict, list, set)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for now, before in (*attributes, *contents):
            if _identities(now) != _identities(before):  # other threads may read what has not changed
                now.clear()
                (now.extend if isinstance(now, list) else now.update)(before)
        for parameter, flag in flags:
            parameter.requires_grad = flag
        for tensor, value in values:
            tensor.data.copy_(value)
        raise


def _identities(container: dict | list | set) -> list[int]:
    return [*map(id, container), *map(id, container.values() if isinstance(container, dict) else ())]


def take_out(model: nn.Module, adapter_name: str, requires_grad: Sequence[tuple[nn.Parameter, bool]]) -> None:
    """Undoes the injection of an adapter, as if it had never been tried; parameters require what they did before."""
    for module in list(model.modules()):
        if isinstance(module, LoTRALayer) and adapter_name in module.lotra_core:
            adapters, bare = module.lotra_core, module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            adapters, bare = module.modules_to_save, module.original_module
        else:
            continue
        if len(adapters) == 1:
            replace_module(model, module, bare)
        elif isinstance(module, LoTRALayer):
            module.delete_adapter(adapter_name)
        else:
            module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])
    release_networks(model)
    for parameter, flag in requires_grad:
        parameter.requires_grad = flag


def check_names(config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Compares the names in a file of tensors with those that the adapter has in this model."""
    if config.checkpoint.tensors is None or getattr(model, "_checkpoint_conversion_mapping", None):
        return  # not from a file, or the names in the file are older ones
    modules = dict(model.named_modules())
    adapted = {id(modules[name]): COMPONENTS[: 1 + len(t.coefficients.shape)] for name, t in targets.items()}
    expected, allowed = set(), set()
    for name, module in model.named_modules(remove_duplicate=False):  # a shared layer has several names
        keys = []
        if id(module) in adapted:
            keys = adapted[id(module)]
        elif any(name.endswith(ending) for ending in config.modules_to_save or ()):  # PEFT's own rule
            keys = list(getattr(module, "original_module", module).state_dict())
            # what PEFT writes once more for an embedding, and loads nowhere
            allowed.update({f"{name}.modules_to_save.{key}" for key in keys} - model.state_dict().keys())
        (expected if name in modules else allowed).update(f"{name}.{key}" for key in keys)
    # PEFT 0.19 saves the components of all adapters, those of the others with their names; they are passed over
    allowed.update(name for name in config.checkpoint.tensors if _is_of_another_adapter(name))
    config.checkpoint.check_names(expected, allowed)


def _is_of_another_adapter(name: str) -> bool:
    return name.rpartition(".")[0].endswith(COMPONENTS)


def mismatches(
    model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, list[str]], set[str]]:
    """What a state dict has in another shape or kind than adapters, in words, by adapter; and the adapters in it."""
    wrong: dict[str, list[str]] = {}
    loaded: set[str] = set()
    for name, adapter, expected, remark in _adapter_tensors(model):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor):
            loaded.add(adapter)
            if problem := differ(tensor, expected):
                wrong.setdefault(adapter, []).append(f"{_without(adapter, name)}: {problem}{remark}")
    return wrong, loaded


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


def differ(tensor: Tensor, expected: Tensor, new: str = "the checkpoint", old: str = "the model") -> str:
    """How a tensor of a file has another shape than that of the model, or a dtype of another kind; empty if not."""
    if tensor.shape != expected.shape:
        return f"{tuple(tensor.shape)} in {new}, {tuple(expected.shape)} in {old}"
    if _kind(tensor.dtype) != _kind(expected.dtype):
        return f"{tensor.dtype} in {new}, {expected.dtype} in {old}"
    return ""


def _kind(dtype: torch.dtype) -> tuple[bool, ...]:
    is_float = dtype.is_floating_point
    return is_float, is_float and dtype.itemsize < 2, dtype.is_complex, dtype == torch.bool


def select_to_load(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to load into an adapter that exists, without those of others, which PEFT 0.19 saves along."""
    layers = lotra_layers(model, adapter_name)
    own = {f"{name}.{part}.{adapter_name}" for name, layer in layers for part in layer.adapter_layer_names}
    selected = {name: t for name, t in state_dict.items() if name in own or not _is_of_another_adapter(name)}
    base = model.state_dict().keys()
    wrong = [f"{name} is missing" for name in sorted(own - state_dict.keys())]
    for name, tensor in selected.items():
        if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
            wrong.append(f"{_without(adapter_name, name)} has values that are not finite")
        if name not in own and f".modules_to_save.{adapter_name}." not in name and name in base:
            wrong.append(f"{name} would be written over, which is no part of the adapter ({OF_THE_BASE})")
    refuse("The tensors are not those of the adapter, nothing was loaded:", wrong)
    return selected


def select_to_save(adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The components of an adapter in a state dict, whole; what is of the base is taken out of the dict.

    PEFT looks for the names of the layers in the model, which the state dict does not have if FSDP wraps the layers.
    """
    endings = tuple(f".{component}.{adapter_name}" for component in COMPONENTS)
    # PEFT would go on to write embeddings that were resized, or that `save_embedding_layers` asks for
    for key in [key for key in state_dict if not key.endswith(endings) and ".modules_to_save." not in key]:
        del state_dict[key]
    tensors = {key: value for key, value in state_dict.items() if key.endswith(endings)}
    for key, tensor in tensors.items():
        # FSDP has flat views of what this process holds, fully_shard DTensors
        whole = tensor.dim() in ((3, 4) if ".lotra_core." in key else (2,))
        if not whole or hasattr(tensor, "placements") or hasattr(tensor, "local_shards"):
            raise ValueError(
                f"{key} is a part of a tensor, {tuple(tensor.shape)}, which is spread over several processes. "
                "Gather whole tensors on all of them, with torch.distributed.checkpoint.state_dict: `state_dict = "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, and pass them: "
                "`save_pretrained(folder, state_dict=state_dict)`. For accelerate and Trainer, set FSDP's "
                "`state_dict_type` to FULL_STATE_DICT."
            )
    return tensors
