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

"""How adapters come into a model and out of it again, for [`LoTRAModel`] and for LoTRA in PEFT's mixed models."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..families.slim import SlimLayer
from ..kan.slim_kan import SlimKANLinear
from .config import ALL_KAN, LoTRAConfig
from .guards import guard_network, release_networks
from .layer import LoTRALayer
from .loading import check_names
from .slim import SlimLoTRALayer
from .targets import Target, check_base, describe_targets, find_targets, locate_target


def prepare_config(config: LoTRAConfig) -> LoTRAConfig:
    """Replaces the default of `target_modules`."""
    if config.target_modules is None:
        config.target_modules = ALL_KAN
    return config


def prepare_targets(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    """Finds and checks all targets before the first of them is touched, and writes them into the configuration."""
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type` is {config.task_type!r}, but the model does not generate: it has no "
            "`prepare_inputs_for_generation`. Leave `task_type` out."
        )
    targets = find_targets(config, model)
    if config.targets_all_kan:
        config.target_modules = set(targets)
    config.base_layers = describe_targets(targets)
    check_base(config, model, targets)
    check_names(config, model, targets)
    return targets


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
