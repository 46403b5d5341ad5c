# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on layers that are Tucker tensors already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec, get_kan_spec
from ..families.slim import SlimLayer
from ..kan.slim_kan import SlimKANLinear
from ..modules.calls import share_hooks
from ..tucker import Tucker, Update, direct_sum, tucker
from .grid_watch import GridWatch
from .layer import LoTRALayer
from .merging import without_autocast


SLIM_MERGES = ("densify", "truncate")


class SlimLoTRALayer(LoTRALayer):
    """
    A Slim layer (`SlimKANLinear` or `SlimLayer`) with LoTRA adapters.

    The base layer runs with the components of its sum with the updates, a Tucker tensor of more ranks: no dense tensor
    is built. There is no fast path: the families of Slim layers give no formula.

    A merge always keeps the Slim layer, which is small. If the dense equivalent is changed while adapters are merged
    into it, it stays the base layer, since a Slim layer cannot hold every change.

    Attributes:
        slim_merge (`str`): How adapters are merged. "densify" replaces the base layer by its dense equivalent,
            exactly; "truncate" keeps the layer Slim, at the ranks that it had, by HOOI.
        merge_error (`float`, *optional*): After a truncating merge the norm of the difference between the sum and the
            merged tensor, as a share of the norm of the sum.
    """

    slim_merge = "densify"
    merge_error: float | None
    base_layer: Any
    _always_keeps_base = True
    # The Slim layer, its family and its coefficients after a merge has put the dense equivalent in its place. In a
    # list: as a module it would be a part of the state dict.
    _slim: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self)["_slim"] = []
        super().__init__(*args, **kwargs)

    @property
    def is_dense(self) -> bool:
        """Whether a merge has put the dense equivalent in the place of the Slim layer."""
        return not isinstance(self._modules["base_layer"], (SlimKANLinear, SlimLayer))

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
        if self.is_dense or not updates:
            return super()._parameters_with(updates)
        with without_autocast(updates):
            return self._components_with(updates)._asdict()

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        return super()._base_parameters() if self.is_dense else self.base_layer.components._asdict()

    def base_before_merge(self) -> tuple[nn.Module, KANLayerSpec, CoefficientTensor]:
        if self._is_kept_slim():
            layer, spec, tensor = self._slim
            return layer, spec, tensor
        return super().base_before_merge()

    def _coefficients_before_merge(self) -> torch.Tensor:
        kept = self.parameters_before_merge
        return Tucker(**kept).dense() if "core" in kept else super()._coefficients_before_merge()

    def _is_kept_slim(self) -> bool:
        """Whether unmerging puts a Slim layer in the place of the dense one."""
        return self.is_dense and "core" in self.parameters_before_merge

    def _prepare_merge(self) -> None:
        if self.slim_merge == "densify" and not self.is_dense:
            self._densify()

    def _add(self, updates: Sequence[Update]) -> None:
        if self.is_dense:
            super()._add(updates)
        else:
            self._truncate(updates)

    def _densify(self) -> None:
        slim, spec, tensor = self.base_layer, self.lotra_spec, self.lotra_tensor
        # a tensor that is made in inference mode could never be trained
        with torch.inference_mode(False), torch.autocast(slim.core.device.type, enabled=False):
            dense = slim.to_dense()
        share_hooks(slim, dense)
        dense_spec = get_kan_spec(dense)
        assert dense_spec is not None
        self._exchange(dense, dense_spec, dense_spec.locate(dense))
        self._slim = [slim, spec, tensor]

    def _exchange(self, layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> None:
        """Replaces the base layer. The grids that are recorded are named as in the new one."""
        names = dict(zip(self.read_grid(), spec.read_grid(layer), strict=True))
        records = [self._grid_at_merge, *self.lotra_grid.values()]
        renamed = {id(grid): {names[name]: value for name, value in grid.items()} for grid in records}
        vars(self).update(
            lotra_spec=spec,
            lotra_tensor=tensor,
            lotra_grid={adapter: renamed[id(grid)] for adapter, grid in self.lotra_grid.items()},
            lotra_formula=None,
            _grid_at_merge=renamed[id(self._grid_at_merge)],
            _grid_watch=GridWatch(),
        )
        self._modules["base_layer"] = layer.train(self.base_layer.training)

    @torch.no_grad()
    def _truncate(self, updates: Sequence[Update]) -> None:
        with without_autocast(updates):
            merged = self._components_with(updates).map(torch.Tensor.double).orthogonal()
            small = merged.truncated(self.base_layer.ranks)
        missed = (merged.core.square().sum() - small.core.square().sum()).clamp(min=0).sqrt()
        self.merge_error = (missed / merged.core.norm().clamp(min=1e-300)).item()
        self._write(small.balanced()._asdict())

    def _remark_on_changes(self) -> str:
        if self.is_dense:
            return " The layer stays dense." if self._is_kept_slim() else ""
        return f" The result is truncated to the ranks {self.base_layer.ranks}."

    def _restore(self) -> None:
        if self._is_kept_slim():
            self._exchange(*self._slim)
        super()._restore()

    def _forget_merge(self) -> None:
        super()._forget_merge()
        self.merge_error = None

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self._is_kept_slim():
            self._slim[0]._apply(fn, *args, **kwargs)
        return self

    def take_over_flags(self) -> None:
        """Lets the parameters of the dense layer require a gradient where those of the Slim one do."""
        if self.is_dense:
            for parameter, like in zip(
                self.base_layer.parameters(), self._slim[0].to_dense().parameters(), strict=True
            ):
                parameter.requires_grad = like.requires_grad

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Sets the base layer to the best approximation (HOOI) of these coefficients that its ranks allow."""
        if self.is_dense:
            super().set_base_weight(weight_data)
        else:
            self._write(tucker(weight_data, self.base_layer.ranks).balanced()._asdict())
