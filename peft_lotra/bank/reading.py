# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters read from folders, models and state dicts, and compared with the base of a bank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..layers.registry import PREFIX
from ..tucker import Tucker, Update, full_shape
from ..tuner.base_record import record_layer
from ..tuner.config import LoTRAConfig
from ..tuner.layer import COMPONENTS, LoTRALayer, lotra_layers
from ..tuner.model import read_checked
from ..tuner.saving import check_state_dict
from ..tuner.targets import Target, check_targets, find_targets


Adapter = nn.Module | str | os.PathLike | Mapping[str, Tensor] | LoTRAConfig
Updates = dict[str, Update]  # of an adapter, by layer


def match_layers(
    record: Mapping[str, Any], base: nn.Module, check_base: str | None
) -> tuple[dict[str, Target], dict[str, str]]:
    """The layers of a base that were recorded, by their names there, and these names by the recorded ones.

    Raises:
        ValueError: A layer is missing, of another kind or shape, or, by `check_base`, of another grid or base.
    """
    config = LoTRAConfig(base_layers=dict(record), check_base=check_base)  # pyright: ignore[reportArgumentType]
    targets = find_targets(config, base)
    read_checked(config, base, targets)
    return targets, dict(zip(record, targets, strict=True))


def read_adapter(
    adapter: Adapter,
    base: nn.Module,
    adapter_name: str | None,
    alpha: float,
    check_base: str | None,
    known: list[Any],
) -> Updates:
    """The updates of an adapter. Records of bases that agreed with this one are `known`, and not compared again.

    Raises:
        ValueError: The adapter is none of LoTRA, does not fit the base, or has values that are not finite.
    """
    if isinstance(adapter, (str, os.PathLike)):
        config = LoTRAConfig.from_pretrained(str(adapter), check_base=check_base)
        if not isinstance(config, LoTRAConfig) or config.modules_to_save:
            raise ValueError("it is no LoTRA adapter, or one that saves modules, which a bank does not hold.")
        record = config.base_layers
        config.check_base = "ignore" if record in known else config.check_base
        targets = find_targets(config, base)
        tensors = read_checked(config, base, targets)
        alphas = {name: config.ranks_and_alpha(name, it.tensor.shape)[1] for name, it in targets.items()}
        found = {name: Update(alphas[name], _components(tensors, name, target)) for name, target in targets.items()}
    elif isinstance(adapter, LoTRAConfig):
        if adapter.modules_to_save or adapter.rank_dropout or adapter.module_dropout or adapter.train is not None:
            raise ValueError("a bank has neither dropout nor modules to save, and trains all components.")
        targets, record = find_targets(adapter, base), None
        check_targets(adapter, base, targets)
        if not targets:
            raise ValueError(f"`target_modules` is {adapter.target_modules}, which matches no KAN layer.")
        found = {}
        for name, target in targets.items():
            layer = LoTRALayer(*target, name)
            layer.update_layer("new", adapter)
            found[name] = layer.update_of("new")
    elif isinstance(adapter, PeftModel):
        name: Any = adapter_name or adapter.active_adapter
        layers = dict(lotra_layers(adapter.get_base_model(), name))
        if not layers or getattr(adapter.peft_config[name], "modules_to_save", None):
            raise ValueError(f"the model has no LoTRA layers with an adapter {name!r}, or it saves modules.")
        record = {place: record_layer(layer) for place, layer in layers.items()}
        targets, names = match_layers(record, base, "ignore" if record in known else check_base)
        found = {names[place]: layer.update_of(name) for place, layer in layers.items()}
        check_state_dict({f"{name}.{place}": p for name, it in found.items() for place, p in enumerate(it.tensor)})
    elif isinstance(adapter, Mapping):
        check_state_dict(adapter)
        targets, record = find_targets(LoTRAConfig(), base), None
        keys = {name: [key for key in adapter if key.startswith(f"{PREFIX}{name}.lotra_")] for name in targets}
        if others := adapter.keys() - {key for own in keys.values() for key in own} or not adapter:
            raise ValueError(f"the state dict has no components, or {others} besides.")
        found = {name: Update(alpha, _components(adapter, name, targets[name])) for name, own in keys.items() if own}
    else:
        kinds = "a PeftModel, a folder, a state dict or a LoTRAConfig"
        raise TypeError(f"it is of type {type(adapter).__name__}, but must be {kinds}.")
    for name, update in found.items():
        _check_shapes(name, update.tensor, targets[name])
    if record is not None and record not in known:
        known.append(record)
    return found


def _components(tensors: Mapping[str, Tensor], layer: str, target: Target) -> Tucker:
    names = [f"{PREFIX}{layer}.{component}" for component in COMPONENTS[: 1 + len(target.tensor.shape)]]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{', '.join(missing)} is missing.")
    return Tucker(*(tensors[name] for name in names))


def _check_shapes(name: str, components: Tucker, target: Target) -> None:
    """Raises a ValueError for components that make no update of this layer, with or without the residual branch."""
    core, *factors = components
    shape, without = full_shape(target.tensor), target.tensor.shape
    sizes = tuple(factor.shape[0] if factor.dim() == 2 else -1 for factor in factors)
    if sizes not in (shape, without) or tuple(core.shape) != tuple(factor.shape[1] for factor in factors):
        given = [tuple(part.shape) for part in components]
        raise ValueError(f"its components of `{name}` have the shapes {given}, which do not make a tensor {shape}.")
