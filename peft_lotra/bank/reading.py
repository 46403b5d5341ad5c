# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters read from folders, models and state dicts, and compared with the base of a bank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..modules.calls import PREFIX, check_loaded
from ..tucker import Tucker, Update, read_components
from ..tuner.base_record import record_layer
from ..tuner.config import LoTRAConfig, pattern_key
from ..tuner.layer import LoTRALayer, lotra_layers
from ..tuner.linear_path import PATH, LinearPath
from ..tuner.model import read_checked
from ..tuner.saving import check_state_dict, check_tensors
from ..tuner.targets import Target, check_targets, find_targets


Adapter = nn.Module | str | os.PathLike | Mapping[str, Tensor] | LoTRAConfig


def match_layers(
    record: Mapping[str, Any],
    base: nn.Module,
    check_base: str | None,
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the recorded layers of a base by their names there, and these names by the recorded ones.

    Raises:
        ValueError: A layer is missing, of another kind or shape, or, by `check_base`, of another grid or base.
    """
    config = LoTRAConfig(base_layers=dict(record), check_base=check_base)  # pyright: ignore[reportArgumentType]
    targets = find_targets(config, base)
    read_checked(config, base, targets)
    return targets, config.names_in_model


def read_adapter(
    adapter: Adapter,
    base: nn.Module,
    alpha: float,
    check_base: str | None,
    agreeing: list[Any],
) -> tuple[dict[str, Update], bool | str]:
    """Return the updates of an adapter, by layer, and how its training started.

    Records of bases that agreed with this one are in `agreeing`, and not compared again.

    Raises:
        ValueError: The adapter is none of LoTRA, does not fit the base, or has values that are not finite.
    """
    record = None
    targets = {}
    tensors: Any = {}
    updates = {}
    if isinstance(adapter, (str, os.PathLike)):
        config: Any = LoTRAConfig.from_pretrained(str(adapter), check_base=check_base)
        if config.companions:
            raise ValueError(
                f"it was saved with adapters of other methods, {config.companions}, which a bank does not hold. Load "
                "them by `load_adapters`, or save the LoTRA adapter alone, by `selected_adapters=`."
            )
        record = config.base_layers
        if record in agreeing:
            config.check_base = "ignore"
        targets = find_targets(config, base)
        # another process may be saving into the folder
        tensors = read_checked(config, base, targets, is_strict=True)
    elif isinstance(adapter, LoTRAConfig):
        config = copy(adapter)
        updates = _start(config, base)
    elif isinstance(adapter, PeftModel):
        check_methods(adapter, "it")
        check_loaded(adapter, "adapter")
        names = adapter.active_adapters
        if len(names) != 1:
            raise ValueError(
                f"it has the active adapters {names}, and one is added. Activate one by `set_adapter`, or sum them by "
                "`add_weighted_adapter`."
            )
        (active,) = names
        config = adapter.peft_config[active]
        layers = dict(lotra_layers(adapter.get_base_model(), active))
        record = {name: record_layer(layer) for name, layer in layers.items()}
        if record in agreeing:
            check_base = "ignore"
        _, names_in_base = match_layers(record, base, check_base)
        for name, layer in layers.items():
            updates[names_in_base[name]] = layer.update_of(active)
    elif isinstance(adapter, Mapping):
        config = LoTRAConfig(alpha=alpha, adapt_residual=False)
        tensors = adapter
        targets = _match_state_dict(tensors, config, base)
    else:
        raise TypeError(f"it must be a PeftModel, a folder, a state dict or a LoTRAConfig, not a {type(adapter)}.")

    for name in targets:
        components = read_components(tensors, f"{PREFIX}{name}.")
        updates[name] = Update(config.alpha_of(name), components)

    if not updates:
        raise ValueError("it adapts no KAN layer of the base.")
    if config.modules_to_save and not isinstance(adapter, LoTRAConfig):
        if config.modules_to_save != [PATH] or not isinstance(base, LinearPath):
            raise ValueError("it saves modules, which a bank does not hold, but for the path of a `LinearPath`.")
        if isinstance(adapter, PeftModel):
            network: Any = adapter.get_base_model()
            values = network.path_of(adapter.active_adapters[0]).values()
        else:
            values = torch.cat([tensors[f"{PREFIX}{PATH}.{name}"].flatten() for name in ("weight", "bias", "scale")])
        change = values - base.path_of("__base__").values().to(values)
        updates[PATH] = Update(1.0, Tucker(change.view(-1, 1, 1), None, None, None))
    if record is not None and record not in agreeing:
        agreeing.append(record)
    return updates, config.init_weights


def check_methods(model: nn.Module, name: str) -> None:
    """Raise a ValueError if a model has adapters of other methods, which a bank would leave out or always add."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoTRALayer):
            raise ValueError(
                f"{name} has adapters of other methods ({type(module).__module__}), which a bank does not hold. Merge "
                "them into the base, or remove them."
            )


def _match_state_dict(
    tensors: Mapping[str, Tensor],
    config: LoTRAConfig,
    base: nn.Module,
) -> dict[str, Target]:
    """Return the layers that a state dict adapts; its shapes determine the ranks and the base branch."""
    check_state_dict(tensors)
    targets = {}
    for name, target in find_targets(LoTRAConfig(), base).items():
        prefix = f"{PREFIX}{name}.lotra_"
        core = tensors.get(f"{prefix}core")
        if core is None:
            continue
        targets[name] = target
        config.rank_pattern[pattern_key(name)] = tuple(core.shape)
        factor = tensors.get(f"{prefix}factor_basis")
        # slices, since a damaged tensor may have fewer dimensions
        size = core.shape[2:3] if factor is None else factor.shape[:1]
        config.adapt_residual |= size > target.tensor.shape[2:3]
    check_tensors(tensors, config, base, targets)
    return targets


def _start(config: LoTRAConfig, base: nn.Module) -> dict[str, Update]:
    """Return the updates of a new adapter."""
    targets = find_targets(config, base)
    config.spend_budget(targets)
    if config.train is not None:
        raise ValueError("a bank trains all components.")
    check_targets(config, base, targets)
    updates = {}
    for name, target in targets.items():
        layer = LoTRALayer(*target, name)
        layer.update_layer("new", config)
        updates[name] = layer.update_of("new")
    return updates
