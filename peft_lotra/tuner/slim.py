# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on layers that are Tucker tensors already."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..families.registry import get_kan_spec
from ..tucker import Tucker, Update, direct_sum, tucker
from .layer import LoTRALayer
from .merging import without_autocast


SLIM_MERGES = ("densify", "truncate")


class SlimLoTRALayer(LoTRALayer):
    """
    A Slim layer (`SlimKANLinear` or `SlimLayer`) with LoTRA adapters.

    The base layer runs with the components of its sum with the updates, a Tucker tensor of more ranks: no dense tensor
    is built. There is no fast path: the families of Slim layers give no formula.

    Attributes:
        slim_merge (`str`): How adapters are merged. "densify" replaces the base layer by its dense equivalent,
            exactly; "truncate" keeps the layer Slim, at the ranks that it had, by HOOI.
        merge_error (`float`, *optional*): After a truncating merge the norm of the difference between the sum and the
            merged tensor, as a share of the norm of the sum.
    """

    slim_merge = "densify"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.merge_error: float | None = None
        self._before_merge: list[Any] = []  # for `unmerge`: the components, or the base layer with its family

    def _components_with(self, updates: Iterable[Update]) -> Tucker:
        """The components of the base layer and the updates together."""
        parts: list[Tucker] = [self.base_layer.components]
        (basis, _), dtype = parts[0].factor_basis.shape, parts[0].core.dtype
        for scale, tensor in updates:
            # without the residual branch, its slice of the update is zero
            tensor = tensor.padded(basis)._replace(core=scale * tensor.core)
            parts.append(tensor.map(lambda part: part.to(dtype)))
        return direct_sum(parts)

    def _parameters_with(self, updates: Sequence[Update]) -> dict[str, torch.Tensor]:
        if not updates:
            return {}
        with without_autocast(updates):
            return self._components_with(updates)._asdict()

    @torch.no_grad()
    def _merge(self, adapter_names: list[str]) -> None:
        adapter_names = [*self.merged_adapters, *adapter_names]
        self._unmerge()
        merged = self._components_with([self._update(name) for name in adapter_names])
        if self.slim_merge == "densify":
            self._put_dense(merged)
        else:
            self._put_truncated(merged)
        self.merged_adapters.extend(adapter_names)

    def check_safe_merge(self, adapter_names: list[str] | None = None) -> None:
        for adapter in self._adapters_here(self.active_adapters if adapter_names is None else adapter_names):
            if not all(torch.isfinite(component).all() for component in self.get_components(adapter)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")

    def _put_dense(self, merged: Tucker) -> None:
        # kept in a list: as a module, the base layer would be a part of the state dict
        self._before_merge = [self.base_layer, self.lotra_spec, self.lotra_tensor]
        slim = copy.deepcopy(self.base_layer)
        for name, value in merged._asdict().items():
            setattr(slim, name, nn.Parameter(value))
        dense = slim.to_dense()
        spec = get_kan_spec(dense)
        assert spec is not None
        self.base_layer, self.lotra_spec, self.lotra_tensor = dense, spec, spec.locate(dense)

    def _put_truncated(self, merged: Tucker) -> None:
        self._before_merge = [component.detach().clone() for component in self.base_layer.components]
        merged = merged.map(torch.Tensor.double).orthogonal()
        small = merged.truncated(self.base_layer.ranks)
        missed = (merged.core.square().sum() - small.core.square().sum()).clamp(min=0).sqrt()
        self.merge_error = (missed / merged.core.norm().clamp(min=1e-300)).item()
        self._put(small.balanced())

    def _unmerge(self) -> None:
        """Restores the base layer as it was before any merge."""
        before = self._before_merge
        if before and isinstance(before[0], nn.Module):
            moved_to = next(self.base_layer.parameters())
            self.base_layer, self.lotra_spec, self.lotra_tensor = before
            self.base_layer.to(moved_to)
        elif before:
            self._put(Tucker(*before))
        self._before_merge, self.merge_error = [], None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _put(self, components: Tucker) -> None:
        for component, value in zip(self.base_layer.components, components, strict=True):
            component.copy_(value)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Sets the base layer to the best approximation (HOOI) of these coefficients that its ranks allow."""
        self._put(tucker(weight_data, self.base_layer.ranks).balanced())
