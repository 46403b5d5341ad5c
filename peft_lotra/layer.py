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

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import LoTRAConfig
from .functional import call_with_parameters
from .initialization import reset_components, reset_components_from_gradient
from .kan.layer import KANLinear
from .kan.layer_jets import contract_updates, in_transform
from .kan_layers import KANLayerSpec
from .proxy import BaseLayerProxy
from .tucker import cap_ranks, reconstruct


class LoTRALayer(BaseLayerProxy, BaseTunerLayer):
    """
    A KAN layer with LoTRA adapters.

    The base layer itself runs, with `parameter + delta` in the place of the parameters that hold its coefficients.
    That is exact for every family, keeps whatever the layer returns, and needs no knowledge of its basis.

    Attributes that this class does not have are those of the base layer, see [`BaseLayerProxy`].

    Args:
        base_layer (`nn.Module`): The KAN layer.
        spec (`KANLayerSpec`): The family it belongs to.
        adapter_name (`str`): The name of the first adapter.
        config (`LoTRAConfig`): The configuration of the first adapter.
        r (`int` or `tuple[int, int, int]`): Its ranks.
        alpha (`float`): Its scale.
    """

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = (
        "lotra_core",
        "lotra_factor_out",
        "lotra_factor_in",
        "lotra_factor_basis",
    )
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        "lotra_r",
        "lotra_alpha",
        "lotra_scaling",
        "lotra_rank_dropout",
        "lotra_module_dropout",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        spec: KANLayerSpec,
        adapter_name: str,
        config: LoTRAConfig,
        r: int | tuple[int, int, int],
        alpha: float,
        **kwargs,
    ) -> None:
        super().__init__()
        self.lotra_spec = spec
        self.lotra_tensor = spec.locate(base_layer)
        self.lotra_r = {}
        self.lotra_alpha = {}
        self.lotra_scaling = {}
        self.lotra_rank_dropout = {}
        self.lotra_module_dropout = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.out_features, self.in_features, _ = self.lotra_tensor.shape
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled = True
        self.base_layer = base_layer
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        self._grid_at_merge = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r=r, alpha=alpha, config=config, **kwargs)

    ############
    # Adapters #
    ############

    def update_layer(
        self,
        adapter_name: str,
        r: int | tuple[int, int, int],
        alpha: float,
        config: LoTRAConfig,
        **kwargs,
    ) -> None:
        """Internal function to create a LoTRA adapter

        Args:
            adapter_name (`str`): Name for the adapter to add.
            r (`int` or `tuple[int, int, int]`): Ranks (out, in, basis) of the adapter, capped by the modes' sizes.
            alpha (`float`): Factor that the update is multiplied by.
            config (`LoTRAConfig`): The adapter configuration for this layer.
        """
        shape = self.lotra_tensor.shape
        if config.adapt_residual and self.lotra_tensor.has_residual:
            shape = (*shape[:2], shape[2] + 1)
        ranks = cap_ranks(r, shape)

        self.lotra_r[adapter_name] = ranks
        self.lotra_alpha[adapter_name] = alpha
        self.lotra_scaling[adapter_name] = alpha
        self.lotra_rank_dropout[adapter_name] = config.rank_dropout
        self.lotra_module_dropout[adapter_name] = config.module_dropout
        # Drawn in the base's precision, but not in half of it; _move_adapter_to_device_of_base_layer casts down later.
        dtype = torch.promote_types(self.lotra_tensor.get_parameter(self.get_base_layer()).dtype, torch.float32)
        self.lotra_core[adapter_name] = nn.Parameter(torch.empty(ranks, dtype=dtype))
        for name, size, rank in zip(self.adapter_layer_names[1:], shape, ranks, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(size, rank, dtype=dtype))

        if config.init_weights == "gradient" and config.checkpoint_layers is None:
            reset_components_from_gradient(*self.get_components(adapter_name), layer=self.get_base_layer())
        else:
            self.reset_lotra_parameters(adapter_name, bool(config.init_weights))

        # Move new weights to device
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lotra_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draws the components of an adapter anew; with `init_weights` the update is zero."""
        reset_components(*self.get_components(adapter_name), zero_update=init_weights)

    def get_components(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """core (ro, ri, rb), factor_out (out, ro), factor_in (in, ri) and factor_basis (basis, rb) of an adapter."""
        return tuple(getattr(self, name)[adapter_name] for name in self.adapter_layer_names)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale of an adapter to `scale` times its alpha."""
        if adapter in self.lotra_scaling:
            self.lotra_scaling[adapter] = scale * self.lotra_alpha[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for adapter in self._adapters_here(self.active_adapters):
            self.lotra_scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters, or sets it back to alpha."""
        for adapter in self._adapters_here(self.active_adapters):
            if scale is None:
                self.lotra_scaling[adapter] = self.lotra_alpha[adapter]
            else:
                self.lotra_scaling[adapter] /= scale

    def _adapters_here(self, adapter_names: Iterable[str]) -> list[str]:
        return [name for name in adapter_names if name in self.lotra_core]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # PEFT looks for `.weight`, which KAN layers do not have (or, inkan, only by accident)
        parameter = self.lotra_tensor.get_parameter(base_layer)
        return parameter.device, parameter.dtype

    def get_base_weight(self) -> torch.Tensor:
        """The coefficients of the base layer, (out, in, basis), with the residual branch as the last slice."""
        return self.lotra_tensor.read(self.get_base_layer()).detach()

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Sets the coefficients of the base layer, (out, in, basis), with the residual branch as the last slice."""
        self._write({name: part.detach() for name, part in self.lotra_tensor.split(weight_data).items()})

    @property
    def weight(self) -> torch.Tensor:
        # inkan's layers have one, and PEFT's property would answer without the adapters
        return self.__getattr__("weight")

    ##########
    # Deltas #
    ##########

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update that an adapter makes, (out, in, basis), or (out, in, basis + 1) with the residual branch last.

        Args:
            adapter (`str`): The name of the adapter.
        """
        return self._delta(adapter, dropout=False)

    def _delta(self, adapter: str, dropout: bool) -> torch.Tensor:
        core, *factors = self.get_components(adapter)
        dtype = core.dtype
        # float16 and bfloat16 products on the CPU are slow, and some are not implemented
        if core.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            core, *factors = (component.float() for component in (core, *factors))
        scale = self.lotra_scaling[adapter]
        # Drawn as tensors, not as Python branches: a compiled graph draws anew at each step.
        if dropout and (p := self.lotra_rank_dropout[adapter]):
            kept = torch.rand(len(core), 1, 1, device=core.device) >= p
            core = core * kept.to(core.dtype) / (1 - p)
        if dropout and (p := self.lotra_module_dropout[adapter]):
            scale = scale * (torch.rand((), device=core.device) >= p).to(core.dtype)
        return (scale * reconstruct(core, *factors)).to(dtype)

    def parameters_in_force(
        self, adapters: Iterable[str] | None = None, dropout: bool = False
    ) -> dict[str, torch.Tensor]:
        """The adapted parameters of the base layer, as stored, with the updates of the adapters added.

        Args:
            adapters (`Iterable[str]`, *optional*): The adapters; defaults to those that a forward pass uses now.
            dropout (`bool`): Whether rank and module dropout are drawn, as in a training step.

        Returns:
            `dict[str, torch.Tensor]`: By parameter name; empty if no adapter is in force.
        """
        if adapters is None:
            adapters = [] if self.merged or self.disable_adapters else self.active_adapters
        adapters = self._adapters_here(adapters)
        parameters = {}
        # An autocast delta would have three digits, and be added to a parameter that has seven.
        with torch.autocast(self.lotra_core[adapters[0]].device.type, enabled=False) if adapters else nullcontext():
            for adapter in adapters:
                delta = self._delta(adapter, dropout)
                for name, part in self.lotra_tensor.split(delta).items():
                    parameter = parameters[name] if name in parameters else attrgetter(name)(self.base_layer)
                    _check_exchangeable(self.base_layer, name, parameter, part)
                    parameters[name] = torch.add(parameter, part).to(parameter.dtype)
        return parameters

    def updates_in_force(self) -> list[tuple[float | torch.Tensor, ...]]:
        """For the adapters that a forward pass uses now: scale, core, factor_out, factor_in, factor_basis. Without
        dropout; none of them while merged (then they are in the base layer's parameters) or disabled."""
        adapters = [] if self.merged or self.disable_adapters else self._adapters_here(self.active_adapters)
        return [(self.lotra_scaling[adapter], *self.get_components(adapter)) for adapter in adapters]

    ###########
    # Merging #
    ###########

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights

        Args:
            safe_merge (`bool`, *optional*):
                If `True`, the merged weights are checked for NaNs before they replace the base weights.
            adapter_names (`list[str]`, *optional*):
                The list of adapter names that should be merged. If `None`, all active adapters will be merged.
                Defaults to `None`.

        Raises:
            ValueError: `safe_merge`, and the merged weights are not finite. The base weights are unchanged.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            # no adapter to merge
            return

        if safe_merge:
            self.check_safe_merge(adapter_names)
        for adapter in self._adapters_here(adapter_names):
            if not self.merged_adapters:
                self._grid_at_merge = self._grid_state()
            self._write(self._with_delta(self._base_parameters(), adapter))
            self.merged_adapters.append(adapter)

    def check_safe_merge(self, adapter_names: list[str] | None = None) -> None:
        """
        Check that a merge would produce finite weights only, changing nothing.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters; defaults to all that are active.

        Raises:
            ValueError: It would not.
        """
        parameters = self._base_parameters()
        for adapter in self._adapters_here(self.active_adapters if adapter_names is None else adapter_names):
            if adapter in self.merged_adapters:
                continue
            parameters = self._with_delta(parameters, adapter)
            if not all(torch.isfinite(value).all() for value in parameters.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights.

        Raises:
            RuntimeError: The grid was moved after the merge, so that the coefficients do not mean what they meant.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._grid_at_merge is not None and not _equal(self._grid_at_merge, self._grid_state()):
            raise RuntimeError(
                f"The grid of this {self.lotra_spec.family} layer was moved after {self.merged_adapters} had been "
                "merged: subtracting the update from the new coefficients would not give the base function back. Keep "
                "the merged model (`merge_and_unload`), or load the base model and the adapter anew."
            )
        while self.merged_adapters:
            self._write(self._with_delta(self._base_parameters(), self.merged_adapters[-1], sign=-1))
            self.merged_adapters.pop()
        self._grid_at_merge = None

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        return {name: attrgetter(name)(self.get_base_layer()) for name in self.lotra_tensor.parameters}

    @torch.no_grad()
    def _with_delta(self, parameters: dict[str, torch.Tensor], adapter: str, sign: int = 1) -> dict[str, torch.Tensor]:
        parts = self.lotra_tensor.split(self.get_delta_weight(adapter))
        return {
            name: torch.add(value, parts[name], alpha=sign).to(value.dtype) if name in parts else value
            for name, value in parameters.items()
        }

    @torch.no_grad()
    def _write(self, parameters: dict[str, torch.Tensor]) -> None:
        for name, value in parameters.items():
            attrgetter(name)(self.get_base_layer()).data.copy_(value)

    def _grid_state(self) -> list[torch.Tensor]:
        return [attrgetter(name)(self.get_base_layer()).detach().clone() for name in self.lotra_spec.grid]

    ###########
    # Forward #
    ###########

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        self._check_forward_args(args, kwargs, adapter_names)

        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(args, kwargs, adapter_names)
        if self.merged:
            return self.base_layer(*args, **kwargs)
        return self._adapted_forward(self.active_adapters, args, kwargs)

    def _adapted_forward(self, adapters: Iterable[str], args: tuple, kwargs: dict) -> Any:
        if type(self.base_layer) is KANLinear and in_transform() and not self.training:
            # One row at a time (`torch.func.vmap`), where a gradient of the size of the coefficients would be formed
            # for each row.
            updates = [
                (self.lotra_scaling[name], *self.get_components(name)) for name in self._adapters_here(adapters)
            ]
            return self.base_layer(*args, **kwargs) + contract_updates(self.base_layer, updates, *args, **kwargs)
        parameters = self.parameters_in_force(adapters, dropout=self.training)
        if not parameters:
            return self.base_layer(*args, **kwargs)
        return call_with_parameters(self.base_layer, parameters, self.base_layer, args, kwargs)

    def _check_forward_args(self, args: tuple, kwargs: dict, adapter_names: list[str] | None) -> None:
        """Check if the arguments are compatible with the configs and state of the model"""
        if adapter_names is None:
            return

        x = args[0] if args else next(iter(kwargs.values()))
        if len(x) != len(adapter_names):
            msg = (
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
            raise ValueError(msg)

        if self.merged:
            # It is unclear what would be the right thing to do if users pass adapter_names and there are merged
            # adapters. Therefore, it is better to raise an error in this case.
            msg = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            raise ValueError(msg)

    def _mixed_batch_forward(self, args: tuple, kwargs: dict, adapter_names: list[str]) -> Any:
        """Runs the rows of each adapter by themselves, and puts the results back in the order of the rows."""
        rows_of: dict[str | None, list[int]] = {}
        for row, name in enumerate(adapter_names):
            # rows of "__base__", and of adapters that do not touch this layer
            rows_of.setdefault(name if name in self.lotra_core else None, []).append(row)
        if len(rows_of) == 1:
            return self._adapted_forward([name for name in rows_of if name is not None], args, kwargs)

        results = []
        for name, rows in rows_of.items():
            index = tuple(value[rows] if _is_batch(value, adapter_names) else value for value in args)
            keywords = {k: value[rows] if _is_batch(value, adapter_names) else value for k, value in kwargs.items()}
            results.append(self._adapted_forward([] if name is None else [name], index, keywords))
        order = torch.tensor([row for rows in rows_of.values() for row in rows]).argsort()
        if isinstance(results[0], tuple):  # pykan returns (y, preacts, postacts, postspline)
            return tuple(_in_order(parts, order) for parts in zip(*results, strict=True))
        return _in_order(results, order)

    def __repr__(self) -> str:
        return "lotra." + super().__repr__()


def _check_exchangeable(layer: nn.Module, name: str, parameter: torch.Tensor, part: torch.Tensor) -> None:
    """A sharded parameter has another shape or belongs to a wrapper (FSDP), or is a DTensor, which has placements
    (fully_shard); a parametrized one is computed anew whenever it is read."""
    owner, attribute = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if (
        parameter.shape != part.shape
        or hasattr(parameter, "placements") != hasattr(part, "placements")
        or (attribute not in owner._parameters and attribute not in owner.__dict__)
    ):
        raise RuntimeError(
            f"`{name}` of the base layer is sharded or parametrized, and its adapters are not. Shard the LoTRALayer, "
            "or a module around it (FSDP, fully_shard), but not the base layer inside; remove parametrizations first."
        )


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in zip(first, second, strict=True))


def _is_batch(value: Any, adapter_names: list[str]) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(adapter_names)


def _in_order(parts: Iterable[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """Concatenates results on the batch dimension and sorts the rows; a layer that flattens the leading dimensions
    (ChebyKAN) returns several consecutive rows for each."""
    result = torch.cat(list(parts))
    per_row = len(result) // len(order)
    if per_row == 1:
        return result[order]
    return result.unflatten(0, (len(order), per_row))[order].flatten(0, 1)
