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

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec, same_grid
from ..functional import call_with_parameters
from ..kan.basis import in_transform
from ..kan.jets.layers import contract_updates
from ..kan.layer import KANLinear
from ..tucker import Tucker, Update, cap_ranks
from .config import LoTRAConfig
from .fast_path import can_take_fast_path, fast_forward, find_formula, has_hooks
from .initialization import reset_components, reset_components_from_gradient
from .locks import LayerLock, exclusively
from .merging import MergeableLayer
from .mixed_batch import RowNames, mixed_batch_forward
from .stand_in import BaseLayerProxy


class LoTRALayer(MergeableLayer, BaseLayerProxy, BaseTunerLayer):
    """
    A KAN layer with LoTRA adapters.

    On the universal path the base layer itself runs, with `parameter + delta` in the place of the parameters that hold
    its coefficients. That is exact for every family, keeps whatever the layer returns, and needs no knowledge of its
    basis. Where the family says how its basis is evaluated, the fast path (fast_path.py) computes the same, to
    rounding, at less cost.

    Attributes that this class does not have are those of the base layer, see [`BaseLayerProxy`].

    Args:
        base_layer (`nn.Module`): The KAN layer.
        spec (`KANLayerSpec`): The family it belongs to.
        adapter_name (`str`): The name of the first adapter.
        config (`LoTRAConfig`): The configuration of the first adapter.
        r (`int` or `tuple[int, int, int]`): Its ranks.
        alpha (`float`): Its scale.
        coefficients (`CoefficientTensor`, *optional*): Where the base layer keeps its coefficients, if that is known.
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
        "lotra_grid",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        spec: KANLayerSpec,
        adapter_name: str,
        config: LoTRAConfig,
        r: int | tuple[int, int, int],
        alpha: float,
        coefficients: CoefficientTensor | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        self.lotra_spec = spec
        self.lotra_tensor = coefficients or spec.locate(base_layer)
        self.lotra_r = {}
        self.lotra_alpha = {}
        self.lotra_scaling = {}
        self.lotra_rank_dropout = {}
        self.lotra_module_dropout = {}
        self.lotra_grid = {}  # the grid that an adapter was made on
        self.lotra_lock = LayerLock()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.out_features, self.in_features, _ = self.lotra_tensor.shape
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled = True
        self.base_layer = base_layer
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters = []
        self._forget_merge()
        self._grid_key, self._grid_checked = None, set()
        self._active_adapter = adapter_name
        self.lotra_formula, self._formula_key = None, None
        self._renew_formula()
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
        grid = self.copy_grid()
        # one record serves all adapters that were made on the same grid
        known = (other for other in self.lotra_grid.values() if same_grid(other, grid))
        self.lotra_grid[adapter_name] = next(known, grid)
        self._grid_checked.clear()
        # Drawn in the base's precision, but not in half of it; _move_adapter_to_device_of_base_layer casts down later.
        dtype = torch.promote_types(self.lotra_tensor.get_parameter(self.get_base_layer()).dtype, torch.float32)
        self.lotra_core[adapter_name] = nn.Parameter(torch.empty(ranks, dtype=dtype))
        for name, size, rank in zip(self.adapter_layer_names[1:], shape, ranks, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(size, rank, dtype=dtype))

        if config.init_weights == "gradient" and config.checkpoint.layers is None:
            reset_components_from_gradient(*self.get_components(adapter_name), layer=self.get_base_layer())
        else:
            self.reset_lotra_parameters(adapter_name, bool(config.init_weights))

        # Move new weights to device
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # not set_adapter, which goes through all adapters: loading a thousand would take a million steps
        trainable = adapter_name in self.active_adapters and not config.inference_mode
        for component in self.get_components(adapter_name):
            component.requires_grad_(trainable)

    def reset_lotra_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draws the components of an adapter anew; with `init_weights` the update is zero."""
        reset_components(*self.get_components(adapter_name), zero_update=init_weights)

    def get_components(self, adapter_name: str) -> Tucker:
        """core (ro, ri, rb), factor_out (out, ro), factor_in (in, ri) and factor_basis (basis, rb) of an adapter."""
        return Tucker(*(getattr(self, name)[adapter_name] for name in self.adapter_layer_names))

    @torch.no_grad()
    def set_components(self, adapter_name: str, components: Tucker) -> None:
        """Overwrites the four components of an adapter, in place."""
        for parameter, value in zip(self.get_components(adapter_name), components, strict=True):
            parameter.data.copy_(value)

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
        components = self.get_components(adapter)
        core, scale = self._drop_out(adapter, components.core, dropout)
        return components._replace(core=core).dense(scale)

    def get_low_rank_update(self, adapter: str, dropout: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The same update as a matrix of low rank, left (out, ro) times right (ro, in, basis or basis + 1).

        Args:
            adapter (`str`): The name of the adapter.
            dropout (`bool`): Whether rank and module dropout are drawn, as in a training step.
        """
        components = self.get_components(adapter)
        core, scale = self._drop_out(adapter, components.core, dropout)
        return components.factor_out, components._replace(core=scale * core).expand_inputs()

    def _drop_out(self, adapter: str, core: torch.Tensor, dropout: bool) -> tuple[torch.Tensor, float | torch.Tensor]:
        """The core and the scale of a training step."""
        scale = self.lotra_scaling[adapter]
        # Drawn as tensors, not as Python branches: a compiled graph draws anew at each step.
        if dropout and (p := self.lotra_rank_dropout[adapter]):
            kept = torch.rand(len(core), 1, 1, device=core.device) >= p
            core = core * kept.to(core.dtype) / (1 - p)
        if dropout and (p := self.lotra_module_dropout[adapter]):
            scale = scale * (torch.rand((), device=core.device) >= p).to(core.dtype)
        return core, scale

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

    @property
    def is_random(self) -> bool:
        """Whether a forward pass draws rank or module dropout."""
        adapters = self._adapters_here(self.active_adapters) if self.training else []
        return any(self.lotra_rank_dropout[name] or self.lotra_module_dropout[name] for name in adapters)

    def updates_in_force(self) -> list[Update]:
        """The updates of the adapters that a forward pass uses now. Without
        dropout; none of them while merged (then they are in the base layer's parameters) or disabled."""
        adapters = [] if self.merged or self.disable_adapters else self._adapters_here(self.active_adapters)
        return [Update(self.lotra_scaling[adapter], self.get_components(adapter)) for adapter in adapters]

    ########
    # Grid #
    ########

    def read_grid(self) -> dict[str, torch.Tensor | int | float]:
        """The state that gives the coefficients of the base layer their meaning, by name."""
        return self.lotra_spec.read_grid(self.get_base_layer())

    def copy_grid(self) -> dict[str, torch.Tensor | int | float]:
        """The same, as it is now."""
        grid = self.read_grid()
        return {name: v.detach().clone() if isinstance(v, torch.Tensor) else v for name, v in grid.items()}

    def _check_grid(self, adapters: Iterable[str]) -> None:
        """Raises a RuntimeError if the grid is not the one that the adapters were made on.

        It is compared at each call; on an accelerator, which would have to be waited for, only when another tensor
        stands there, or the tensor was written to (but not through `.data`).
        """
        grid = self.read_grid()
        tensors = [value for value in grid.values() if isinstance(value, torch.Tensor)]
        try:
            key = [(id(value), value._version, value.data_ptr()) for value in tensors]
        except RuntimeError:  # a batch of grids under vmap has no content of its own, inference tensors no version
            return
        if key != self._grid_key or all(value.device.type == "cpu" for value in tensors):
            self._grid_key, self._grid_checked = key, set()
        for adapter in self._adapters_here(adapters):
            recorded = self.lotra_grid[adapter]
            if id(recorded) in self._grid_checked:
                continue
            if not same_grid(recorded, grid):
                raise RuntimeError(
                    f"The grid of this {self.lotra_spec.family} layer was moved after the adapter {adapter!r} had "
                    "been attached: its coefficients would mean other functions. Call `peft_lotra.refit_adapters` "
                    "to carry the adapters over, or move the grid back."
                )
            self._grid_checked.add(id(recorded))

    @exclusively
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return super().state_dict(*args, **kwargs)

    ###########
    # Forward #
    ###########

    @exclusively
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        self._check_forward_args(args, kwargs, adapter_names)
        if not (self.disable_adapters or self.merged or torch.compiler.is_compiling()):
            self._check_grid(self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names))

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
        adapters = self._adapters_here(adapters)
        if type(self.base_layer) is KANLinear and in_transform() and not self.training:
            # One row at a time (`torch.func.vmap`), where a gradient of the size of the coefficients would be formed
            # for each row.
            updates = [Update(self.lotra_scaling[name], self.get_components(name)) for name in adapters]
            return self.base_layer(*args, **kwargs) + contract_updates(self.base_layer, updates, *args, **kwargs)
        self._renew_formula()
        if can_take_fast_path(self, adapters, args, kwargs):
            return fast_forward(self, adapters, args[0], dropout=self.training)
        parameters = self.parameters_in_force(adapters, dropout=self.training)
        if not parameters:
            return self.base_layer(*args, **kwargs)
        return call_with_parameters(self.base_layer, parameters, self.base_layer, args, kwargs)

    def _renew_formula(self) -> None:
        """Looks for the formula of the base layer again where that, or its grid, is no longer the one of last time.

        Not while a graph is compiled, and not inside of `torch.func`, where tensors have no content of their own.
        """
        if torch.compiler.is_compiling() or in_transform():
            return
        parameter = self.lotra_tensor.get_parameter(self.base_layer)
        grid = self.read_grid().values()
        # and a mode in which the base layer may compute something else, as with dropout
        mode = parameter.dtype, parameter.device, self.base_layer.training, has_hooks(self.base_layer)
        key = (*mode, [(id(v), _version(v)) if isinstance(v, torch.Tensor) else v for v in grid])
        if key != self._formula_key:
            self.lotra_formula = find_formula(self.base_layer, self.lotra_spec, self.lotra_tensor)
            self._formula_key = key

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
        names = adapter_names if isinstance(adapter_names, RowNames) else RowNames(adapter_names)
        return mixed_batch_forward(self, args, kwargs, names)

    def __repr__(self) -> str:
        return "lotra." + super().__repr__()


def lotra_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoTRALayer]]:
    """The adapted layers of a model with their names, or those of them that have the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoTRALayer) and (adapter is None or adapter in module.lotra_core):
            yield name, module


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


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
