# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Running statistics of normalizations: each adapter has its own, and the base keeps those that it had.

A batch norm moves its running mean and variance in each training step, whether its parameters are frozen or not. The
buffers of the adapter that is active stand in the normalizations; those of the base and of all other adapters are kept
beside them, and exchanged when another adapter is set, and when adapters are disabled, deleted or unloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..families.registry import short_name
from ..files.checkpoint import NORM_STATS, refuse_for_model
from ..files.format import differ


Stats = Mapping[str, Tensor]  # by name in the bare model, "layers.0.bn.running_mean"
_PREFIX = "lotra_"  # by which PEFT recognizes what belongs to an adapter


def norm_layers(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The modules with running statistics, by their names in the bare model.

    Those in the copies that `modules_to_save` makes are left out: PEFT keeps, saves and exchanges them whole.
    """
    seen = set() if seen is None else seen
    wrappers = {"base_layer": BaseTunerLayer, "original_module": AuxiliaryTrainingWrapper}
    while inner := [module._modules[key] for key, kind in wrappers.items() if isinstance(module, kind)]:
        assert inner[0] is not None
        module = inner[0]
    if id(module) in seen:
        return
    seen.add(id(module))
    if all(isinstance(module._buffers.get(key), Tensor) for key in NORM_STATS[:2]):
        yield name, module
    for child_name, child in module.named_children():
        yield from norm_layers(child, f"{name}.{child_name}" if name else child_name, seen)


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """The running statistics in place: name in the bare model, module, name in the module, tensor."""
    for name, module in norm_layers(model):
        for key in NORM_STATS:
            if isinstance(value := module._buffers.get(key), Tensor):
                yield f"{name}.{key}" if name else key, module, key, value


def stats_in_place(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics that the normalizations of a model hold now."""
    return {name: value for name, _, _, value in _buffers(model)}


def stored_name(name: str) -> str:
    """The name of running statistics in a file: "layers.0.bn.lotra_running_mean"."""
    path, _, key = name.rpartition(".")
    return f"{path}.{_PREFIX}{key}" if path else f"{_PREFIX}{key}"


def take_stats(state_dict: dict[str, Any], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Takes running statistics out of a state dict: by adapter, also of adapters with components but no statistics."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name, _, adapter = key.removeprefix(prefix).rpartition(".")
        if name.endswith((".lotra_core", *_STORED)):
            found.setdefault(adapter, {})
        if name.endswith(_STORED):
            found[adapter][_bare_name(name)] = state_dict.pop(key)
    return found


def pop_stats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes running statistics out of the tensors of a file."""
    found = [key for key in tensors if key.endswith(_STORED)]
    return {_bare_name(short_name(key)): tensors.pop(key) for key in found}


def _bare_name(name: str) -> str:
    path, _, key = name.rpartition(".")
    return f"{path}.{key.removeprefix(_PREFIX)}" if path else key.removeprefix(_PREFIX)


def with_adapter(state_dict: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The state dict of a file, with the name of the adapter behind those names that PEFT has not completed.

    These are running statistics, and components under another name of a layer that a model has twice.
    """
    return {f"{k}.{adapter}" if k.rpartition(".")[2].startswith(_PREFIX) else k: v for k, v in state_dict.items()}


_STORED = tuple(_PREFIX + key for key in NORM_STATS)


class NormStatsTuner(BaseTuner):
    """The part of a tuner that keeps running statistics apart, see `LoTRAConfig.save_norm_stats`.

    With several active adapters, the statistics in force are those of the first. To merge keeps the statistics of the
    adapter, in which its outputs were trained; `unload` brings back those of the base.
    """

    # replaced, never changed: a transaction puts back what an attribute was
    _norm_stats: Mapping[str | None, Stats] = {}  # those that are not in place, by adapter; `None` is the base
    _norm_stats_owner: str | None = None  # whose are in place
    _norm_stats_held = False  # while an adapter is injected

    def _owner_of_stats(self, adapters: Iterable[str]) -> str | None:
        return next((a for a in adapters if getattr(self.peft_config.get(a), "save_norm_stats", False)), None)

    def _place_norm_stats(self, adapter: str | None) -> None:
        """Puts the statistics of an adapter, or of the base, into the normalizations."""
        if adapter == self._norm_stats_owner or self._norm_stats_held:
            return
        here = list(_buffers(self.model))
        stats = {**self._norm_stats, self._norm_stats_owner: {name: value for name, _, _, value in here}}
        coming = {**stats[None], **stats.pop(adapter, {})} if adapter else stats.pop(None)
        own = set() if adapter is None else self._norm_stats.get(adapter, {}).keys()
        with torch.inference_mode(False):
            for name, module, key, value in here:
                new = coming.get(name, value)
                new = new.to(device=value.device, dtype=value.dtype)
                module._buffers[key] = new if adapter is None or name in own else new.clone()
        self._norm_stats, self._norm_stats_owner = stats, adapter

    def _place_stats_in_force(self) -> None:
        if self._norm_stats_held or self._norm_stats.get(None) == {}:  # there are none, as of the last injection
            return
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        disabled = any(layer.disable_adapters for layer in layers)
        self._place_norm_stats(None if disabled else self._owner_of_stats(self.active_adapters))

    def _stats_of(self, adapter: str | None) -> Stats:
        """The statistics of an adapter or of the base; those that the adapter lacks are the base's."""
        if adapter == self._norm_stats_owner:
            return stats_in_place(self.model)
        return self._norm_stats.get(adapter, {})

    def moved_norm_stats(self, adapter: str) -> dict[str, Tensor]:
        """The statistics of the normalizations in which an adapter has other ones than the base."""
        base, own = self._stats_of(None), self._stats_of(adapter)
        moved = {name.rpartition(".")[0] for name, value in own.items() if name in base and _differ(value, base[name])}
        return {name: value for name, value in own.items() if name.rpartition(".")[0] in moved}

    def norm_stats_problems(self, stats: Stats) -> list[str]:
        """Why statistics of a file cannot be those of normalizations of the model, in words."""
        here, wrong = stats_in_place(self.model), []
        norms = {name.rpartition(".")[0] for name in stats}
        wrong += [
            f"{stored_name(name)} is missing"
            for name in here
            if name.rpartition(".")[0] in norms and name not in stats
        ]
        for name, value in stats.items():
            stored = stored_name(name)
            if name not in here:
                wrong.append(f"{stored} is nothing that this adapter has")
            elif problem := differ(value, here[name]):
                wrong.append(f"{stored}: {problem}")
            elif not value.isfinite().all() or (not name.endswith("running_mean") and (value < 0).any()):
                wrong.append(f"{stored} has values that are not finite, or a variance below zero")
        return wrong

    def set_norm_stats(self, adapter: str, stats: Stats) -> None:
        """Gives an adapter statistics, and those of the base for all others."""
        stats = {name: value.detach().clone() for name, value in stats.items()}
        if adapter != self._norm_stats_owner:
            self._norm_stats = {**self._norm_stats, adapter: stats}
            return
        for name, module, key, value in list(_buffers(self.model)):
            new = stats[name] if name in stats else self._norm_stats[None].get(name, value).clone()
            module._buffers[key] = new.to(device=value.device, dtype=value.dtype)

    @contextmanager
    def _norm_stats_for(self, adapters: Sequence[str]) -> Iterator[None]:
        """Places the statistics for a batch of these adapters, if the same ones hold for all of them."""
        if not any(self._norm_stats.values()):  # no normalizations, or none of any adapter
            yield
            return
        owners = list(dict.fromkeys(self._owner_of_stats([adapter]) for adapter in adapters))
        if len(owners) > 1 and any(owner is not None and self.moved_norm_stats(owner) for owner in owners):
            raise ValueError(
                f"The adapters {list(adapters)} have different running statistics of batch norms, which one forward "
                "pass cannot use together. Pass the rows of each adapter by themselves."
            )
        before = self._norm_stats_owner
        self._place_norm_stats(owners[0] if len(owners) == 1 else None)
        try:
            yield
        finally:
            self._place_norm_stats(before)

    # where PEFT changes which adapter is in force

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._place_norm_stats(None)  # copies for `modules_to_save` are made of the base
        self._norm_stats_held = True
        try:
            super().inject_adapter(*args, **kwargs)
        finally:
            self._norm_stats_held = False
            self._place_stats_in_force()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._place_stats_in_force()

    def _enable_adapter_layers(self, *args: Any, **kwargs: Any) -> None:
        super()._enable_adapter_layers(*args, **kwargs)
        self._place_stats_in_force()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._place_stats_in_force()
        self._norm_stats = {key: stats for key, stats in self._norm_stats.items() if key != adapter_name}

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None) -> Any:
        before = self._norm_stats_owner
        # before the modules that `modules_to_save` has copied are in their places
        self._place_norm_stats(self._owner_of_stats(adapter_names or self.active_adapters) if merge else None)
        try:
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        except BaseException:
            self._place_norm_stats(before)
            raise
        self._norm_stats, self._norm_stats_owner = {}, None
        return model

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter, config in self.peft_config.items() if self._norm_stats.get(None) else ():
            if getattr(config, "save_norm_stats", False):
                for name, value in self.moved_norm_stats(adapter).items():
                    destination[f"{prefix}model.{stored_name(name)}.{adapter}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        found = take_stats(state_dict, f"{prefix}model.")
        found = {adapter: stats for adapter, stats in found.items() if adapter in self.peft_config}
        refuse_for_model([problem for stats in found.values() for problem in self.norm_stats_problems(stats)])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for adapter, stats in found.items():
            self.set_norm_stats(adapter, stats)


def _differ(value: Tensor, other: Tensor) -> bool:
    if value.is_meta or other.is_meta:
        return False
    narrow, wide = sorted((value, other), key=Tensor.element_size)  # compared in the fewer digits
    return not torch.equal(narrow, wide.to(narrow))
