# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Coefficients with updates added: for one call, or merged into the base layer, and back without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import Grid, KANLayerSpec, same_grid
from ..files.fingerprint import hash_values
from ..tucker import Tucker, Update


def without_autocast(updates: Sequence[Update]) -> Any:
    """A context in which an update keeps its digits: by autocast it would have three, beside a parameter's seven."""
    if not updates or updates[0].tensor.core.is_meta:
        return nullcontext()
    return torch.autocast(updates[0].tensor.core.device.type, enabled=False)


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


class MergeableLayer(nn.Module, BaseTunerLayer):
    """The part of an adapted layer that merges.

    Attributes:
        keep_base (`bool`): Whether the next merge keeps a copy of the parameters of the base.
        parameters_before_merge (`dict[str, torch.Tensor]`): The copy, while adapters are merged.
    """

    keep_base = True

    # what LoTRALayer provides
    lotra_spec: KANLayerSpec
    lotra_tensor: CoefficientTensor
    merged_adapters: list[str]
    read_grid: Callable[[], Grid]
    copy_grid: Callable[[], Grid]
    get_components: Callable[[str], Tucker]
    _adapters_here: Callable[[Iterable[str]], list[str]]
    _update: Callable[[str], Update]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights

        Args:
            safe_merge (`bool`, *optional*): Whether to check first that the merged weights are finite.
            adapter_names (`list[str]`, *optional*): The adapters to merge; defaults to all that are active.

        Raises:
            ValueError: `safe_merge`, and the merged weights are not finite. The base weights are unchanged.
        """
        adapter_names = self._adapters_here(check_adapters_to_merge(self, adapter_names))
        if adapter_names and safe_merge:
            self.check_safe_merge(adapter_names)
        if adapter_names:
            self._merge(adapter_names)

    def _merge(self, adapter_names: list[str]) -> None:
        if not self.merged_adapters:
            self._grid_at_merge = self.copy_grid()
            if self.keep_base:
                self.parameters_before_merge = {n: p.detach().clone() for n, p in self._base_parameters().items()}
        for adapter in adapter_names:
            scale, components = self._update(adapter)
            self._merged_updates.append(Update(scale, components.map(lambda part: part.detach().clone())))
            self._write(self._with_update(self._base_parameters(), self._merged_updates[-1].dense()))
            self.merged_adapters.append(adapter)
        if self.parameters_before_merge:
            self._hash_of_merged = self._hash()

    def check_safe_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises a `ValueError` if a merge of the adapters, or of those active, would produce weights not finite."""
        parameters = self._base_parameters()
        for adapter in self._adapters_here(self.active_adapters if adapter_names is None else adapter_names):
            if adapter in self.merged_adapters:
                continue
            parameters = self._with_update(parameters, self._update(adapter).dense())
            if not all(torch.isfinite(value).all() for value in parameters.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights.

        The base weights are restored bit for bit from the copy that a merge keeps. After
        `merge_adapter(keep_base=False)`, or if the merged weights were changed meanwhile, the merged updates are
        subtracted instead, with rounding errors.

        Raises:
            RuntimeError: The grid was moved after the merge: the coefficients multiply other functions.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            self._unmerge()

    def _unmerge(self) -> None:
        if not same_grid(self._grid_at_merge, self.read_grid()):
            raise RuntimeError(
                f"The grid of this {self.lotra_spec.family} layer was moved after {self.merged_adapters} had been "
                "merged: subtracting the update from the new coefficients would not give the base function back. Keep "
                "the merged model (`merge_and_unload`), or load the base model and the adapter anew."
            )
        parameters = self.parameters_before_merge
        if not self._is_as_merged():
            if parameters:
                warnings.warn(
                    f"The coefficients of this {self.lotra_spec.family} layer were changed after "
                    f"{self.merged_adapters} had been merged. The changes are kept, and the updates subtracted, with "
                    "rounding errors.",
                    stacklevel=2,
                )
            parameters = self._base_parameters()
            for update in reversed(self._merged_updates):
                parameters = self._with_update(parameters, -update.dense())
        self._write(parameters)
        self.merged_adapters.clear()
        self._forget_merge()

    def _forget_merge(self) -> None:
        self.parameters_before_merge: dict[str, torch.Tensor] = {}
        self._merged_updates: list[Update] = []
        self._grid_at_merge: Grid = {}
        self._hash_of_merged: str | None = None

    def _is_as_merged(self) -> bool:
        """Whether a copy of the base parameters is kept, and the merged parameters have not changed since."""
        return bool(self.parameters_before_merge) and self._hash_of_merged == self._hash()

    def _hash(self) -> str | None:
        """A hash of the adapted parameters; `None` on the meta device, where they have no values."""
        parameters = self._base_parameters()
        return None if any(value.is_meta for value in parameters.values()) else hash_values(parameters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters merged or not. PEFT calls it to unload: no copy of the base is kept."""
        self.keep_base = False
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def _apply(self, fn, *args, **kwargs):
        # The copy moves, and is cast, with the layer; moving is no change after the merge.
        unchanged = self._is_as_merged()
        super()._apply(fn, *args, **kwargs)
        self.parameters_before_merge = {name: fn(value) for name, value in self.parameters_before_merge.items()}
        if unchanged:
            self._hash_of_merged = self._hash()
        return self

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        return self.lotra_tensor.read_parameters(self.get_base_layer())

    @torch.no_grad()
    def _with_update(self, parameters: dict[str, torch.Tensor], update: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = self.lotra_tensor.split(update)
        return {
            name: torch.add(value, parts[name].to(value.device)).to(value.dtype) if name in parts else value
            for name, value in parameters.items()
        }

    @torch.no_grad()
    def _write(self, parameters: dict[str, torch.Tensor]) -> None:
        stored = self._base_parameters()
        for name, value in parameters.items():
            stored[name].data.copy_(value)
