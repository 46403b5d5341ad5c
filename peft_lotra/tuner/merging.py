# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Coefficients with updates added: for one call, or merged into the base layer, and back without a trace."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import Grid, KANLayerSpec, same_grid
from ..files.fingerprint import hash_values
from ..modules.locks import exclusively
from ..tucker import Tucker, Update


def without_autocast(updates: Sequence[Update]) -> Any:
    """A context in which an update keeps its digits: by autocast it would have three, beside a parameter's seven."""
    if not updates or updates[0].tensor.core.is_meta:  # a device without autocast
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


class _Steps(list[Callable[[], None]]):
    """What undoes the merges that were begun."""


class _Open(threading.local):
    # weak: an interruption at the end of `all_or_nothing` would leave copies of all parameters behind
    steps: Callable[[], _Steps | None] = staticmethod(lambda: None)


_open = _Open()


class all_or_nothing:  # in lower case, as a context manager of contextlib
    """Undoes all merging and unmerging that this thread does within, if what is done within is not finished."""

    # A class, since an interruption at the end of the block can keep `__exit__` from being called: what is done stays
    # done then, whereas a generator would undo it as soon as it is collected.
    def __init__(self) -> None:
        self._outer = _open.steps
        self._steps, self._start = _Steps(), 0

    def __enter__(self) -> _Steps:
        self._outer = _open.steps
        outer = _open.steps()
        if outer is not None:
            self._steps, self._start = outer, len(outer)
        _open.steps = weakref.ref(self._steps)
        return self._steps

    def __exit__(self, error: type[BaseException] | None, *args: Any) -> None:
        if error is not None:
            self.undo()
        _open.steps = self._outer

    def undo(self) -> None:
        """Undoes what was done within, the last step first."""
        for undo in reversed(self._steps[self._start :]):
            undo()


class MergeableLayer(nn.Module, BaseTunerLayer):
    """The part of an adapted layer that merges.

    What a merge changes of a layer are values in `__dict__`, the base layer, and the content of `_base_parameters()`.

    Attributes:
        keep_base (`bool`): Whether the next merge keeps a copy of the parameters of the base.
        parameters_before_merge (`dict[str, torch.Tensor]`): The copy, while adapters are merged.
    """

    keep_base = True
    parameters_before_merge: dict[str, torch.Tensor]
    _merged_updates: list[Update]
    _grid_at_merge: Grid
    _hash_of_merged: str | None
    _always_keeps_base = False

    # what LoTRALayer provides
    _modules: dict[str, Any]
    lotra_spec: KANLayerSpec
    lotra_tensor: CoefficientTensor
    merged_adapters: list[str]
    read_grid: Callable[[], Grid]
    copy_grid: Callable[[], Grid]
    get_components: Callable[[str], Tucker]
    _adapters_here: Callable[[Iterable[str]], list[str]]
    _update: Callable[[str], Update]
    _moved_grid: Callable[[str], RuntimeError]
    lotra_grid: dict[str, Grid]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merges the active adapters, or those named, into the parameters of the base layer.

        Args:
            safe_merge (`bool`, *optional*): Whether to check first that the merged weights are finite.
            adapter_names (`list[str]`, *optional*): The adapters to merge; defaults to all that are active.

        Raises:
            ValueError: `safe_merge`, and the merged weights are not finite. The base weights are unchanged.
            RuntimeError: The grid is not the one that an adapter was made on.
        """
        adapter_names = self._adapters_here(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        if adapter_names and safe_merge:
            self.check_safe_merge(adapter_names)
        if adapter_names:
            self._merge(adapter_names)

    @exclusively  # a thread in the forward pass computes with the layer before, or after
    def _merge(self, adapter_names: list[str]) -> None:
        grid = self.read_grid()
        for adapter in adapter_names:
            if not same_grid(self.lotra_grid[adapter], grid):
                raise self._moved_grid(adapter)
        updates = [self._update(adapter) for adapter in adapter_names]
        updates = [update._replace(tensor=update.tensor.map(lambda part: part.detach().clone())) for update in updates]
        with all_or_nothing() as steps:
            kept = before = self._remember(steps)  # one copy undoes an unfinished merge, and unmerges
            is_known = True
            if self.merged_adapters:
                # if not, unmerging has to keep what was changed between the merges
                kept, is_known = self.parameters_before_merge, self._is_as_merged(before)
                if is_known:
                    self._restore()
                    updates = [*self._merged_updates, *updates]
            elif not (self.keep_base or self._always_keeps_base):
                kept, is_known = {}, False
            self._prepare_merge()
            self._add(updates)
            vars(self).update(
                parameters_before_merge=kept,
                merged_adapters=[*self.merged_adapters, *adapter_names],
                _merged_updates=updates if is_known else [*self._merged_updates, *updates],
                _grid_at_merge=self._grid_at_merge if self.merged_adapters else self.copy_grid(),
                _hash_of_merged=hash_values(self._base_parameters()) if is_known else None,
            )

    def check_safe_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises a `ValueError` if a merge of the adapters, or of those active, would produce weights not finite."""
        parameters = self.lotra_tensor.read_parameters(self.get_base_layer())
        names = self.active_adapters if adapter_names is None else adapter_names
        for adapter in self._adapters_here(dict.fromkeys(names)):
            if adapter in self.merged_adapters:
                continue
            parameters = self._with_updates(parameters, [self._update(adapter)])
            if not all(torch.isfinite(value).all() for value in parameters.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")

    def unmerge(self) -> None:
        """
        Undoes all merges: the base layer has its own parameters again.

        They are restored bit for bit from the copy that a merge keeps. After
        `merge_adapter(keep_base=False)`, or if the merged weights were changed meanwhile, the merged updates are
        subtracted instead, with rounding errors.

        Raises:
            RuntimeError: The grid was moved after the merge: the coefficients multiply other functions.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            self._unmerge()

    @exclusively
    def _unmerge(self) -> None:
        if not same_grid(self._grid_at_merge, self.read_grid()):
            raise RuntimeError(
                f"The grid of this {self.lotra_spec.family} layer was moved after {self.merged_adapters} had been "
                "merged: subtracting the update from the new coefficients would not give the base function back. Keep "
                "the merged model (`merge_and_unload`), or load the base model and the adapter anew."
            )
        with all_or_nothing() as steps:
            if self._is_as_merged(self._remember(steps)):
                self._restore()
            else:
                if self.parameters_before_merge:
                    warnings.warn(
                        f"The coefficients of this {self.lotra_spec.family} layer were changed after "
                        f"{self.merged_adapters} had been merged. The changes are kept, and the updates subtracted, "
                        f"with rounding errors.{self._remark_on_changes()}",
                        stacklevel=4,
                    )
                self._add([Update(-scale, tensor) for scale, tensor in reversed(self._merged_updates)])
            self._forget_merge()

    def _forget_merge(self) -> None:
        # replaced, and never changed in place: `_remember` keeps references
        vars(self).update(
            parameters_before_merge={}, merged_adapters=[], _merged_updates=[], _grid_at_merge={}, _hash_of_merged=None
        )

    def _remember(self, steps: _Steps) -> dict[str, torch.Tensor]:
        """Lets the layer be put back as it is now; returns copies of the parameters."""
        copies = {name: parameter.detach().clone() for name, parameter in self._base_parameters().items()}
        steps.append(partial(self._put_back, vars(self).copy(), self._modules["base_layer"], copies))
        return copies

    @exclusively
    def _put_back(
        self, attributes: dict[str, Any], base_layer: nn.Module, parameters: dict[str, torch.Tensor]
    ) -> None:
        vars(self).update(attributes)
        self._modules["base_layer"] = base_layer
        self._write(parameters)

    def _prepare_merge(self) -> None:
        """Lets the base layer be one to which updates can be added."""

    def _remark_on_changes(self) -> str:
        """What the warning says of a layer that was changed while merged."""
        return ""

    def _add(self, updates: Sequence[Update]) -> None:
        """Adds updates to the base layer."""
        self._write(self._with_updates(self._base_parameters(), updates))

    def _restore(self) -> None:
        """Gives the base layer the parameters that it had before the merge."""
        self._write(self.parameters_before_merge)

    def _is_as_merged(self, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Whether a copy of the base parameters is kept, and these are the merged parameters, unchanged."""
        return self._hash_of_merged is not None and self._hash_of_merged == hash_values(parameters)

    def base_before_merge(self) -> tuple[nn.Module, KANLayerSpec, CoefficientTensor]:
        """The base layer without its adapters, its family, and where it keeps its coefficients.

        While adapters are merged, `parameters_before_merge` has the values of its parameters.
        """
        return self._modules["base_layer"], self.lotra_spec, self.lotra_tensor

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
        unchanged = self.merged and self._is_as_merged(self._base_parameters())
        super()._apply(fn, *args, **kwargs)
        self.parameters_before_merge = {name: fn(value) for name, value in self.parameters_before_merge.items()}
        if unchanged:
            self._hash_of_merged = hash_values(self._base_parameters())
        return self

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that a merge writes, by name."""
        return self.lotra_tensor.read_parameters(self.get_base_layer())

    @torch.no_grad()
    def _with_updates(self, parameters: dict[str, torch.Tensor], updates: Sequence[Update]) -> dict[str, torch.Tensor]:
        with without_autocast(updates):
            for update in updates:
                parts = self.lotra_tensor.split(update.dense())
                parameters = {
                    name: torch.add(value, parts[name].to(value.device)).to(value.dtype) if name in parts else value
                    for name, value in parameters.items()
                }
        return parameters

    def _write(self, parameters: Mapping[str, torch.Tensor]) -> None:
        stored = self._base_parameters()
        for name, value in parameters.items():
            parameter = stored[name]
            if any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True)):
                parameter.data = parameter.data.contiguous()  # made by `expand`: its numbers share their memory
            parameter.data.copy_(value)
