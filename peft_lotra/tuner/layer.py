# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import Grid, KANLayerSpec, same_grid
from ..kan.basis import in_transform
from ..kan.jets.layers import contract_updates
from ..kan.layer import KANLinear
from ..modules.calls import call_with_parameters
from ..modules.checks import as_number
from ..modules.locks import LayerLock, exclusively
from ..tucker import KernelTucker, Ranks, Tucker, Update, cap_ranks
from .config import LoTRAConfig
from .exporting import is_tracing, refuse_trace
from .fast_path import Formula, find_formula
from .grid_watch import GridWatch, has_hooks
from .initialization import reset_components, reset_components_from_base, reset_components_from_gradient
from .merging import MergeableLayer, add_updates, without_autocast
from .mixed_batch import MixedBatch, RowNames
from .stand_in import BaseLayerProxy


# The components of adapters, as state dicts have them; a layer without a kernel has all but the last.
COMPONENTS = tuple(f"lotra_{name}" for name in KernelTucker._fields)


class LoTRALayer(MergeableLayer, BaseLayerProxy, BaseTunerLayer):
    """
    A KAN layer with LoTRA adapters.

    The base layer itself runs, with `parameter + update` as its parameters (the universal path), which is exact for
    every family and keeps whatever the layer returns. A family that says how its basis is evaluated takes the fast
    path (fast_path.py), which computes the same, to rounding, at less cost.

    Attributes that this class does not have are those of the base layer, see [`BaseLayerProxy`].

    Args:
        base_layer (`nn.Module`): The KAN layer.
        spec (`KANLayerSpec`): The family of the layer.
        adapter_name (`str`): The name of the first adapter.
        config (`LoTRAConfig`): The configuration of the first adapter.
        r (`int` or `tuple[int, ...]`): The ranks of the first adapter.
        alpha (`float`): The scale of the first adapter.
        coefficients (`CoefficientTensor`, *optional*): Where the base layer keeps its coefficients, if that is known.
    """

    # A forward pass reads it directly: `self.base_layer` would go through `__getattr__`.
    _modules: dict[str, Any]

    # All names of layers that may contain (trainable) adapter weights; a layer with a kernel has "lotra_factor_kernel"
    adapter_layer_names: tuple[str, ...] = COMPONENTS[:-1]
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        "lotra_r",
        "lotra_alpha",
        "lotra_scaling",
        "lotra_rank_dropout",
        "lotra_module_dropout",
        "lotra_grid",
        "lotra_frozen",
    )
    lotra_r: dict[str, tuple[int, ...]]
    lotra_alpha: dict[str, float]
    lotra_scaling: dict[str, float]
    lotra_rank_dropout: dict[str, float]
    lotra_module_dropout: dict[str, float]
    lotra_grid: dict[str, Grid]  # the grid that an adapter was made on
    lotra_frozen: dict[str, tuple[str, ...]]  # the components that are never trained, of adapters that have some
    lotra_formula: Formula | None

    def __init__(
        self,
        base_layer: nn.Module,
        spec: KANLayerSpec,
        adapter_name: str,
        config: LoTRAConfig,
        r: Ranks,
        alpha: float,
        coefficients: CoefficientTensor | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        coefficients = coefficients or spec.locate(base_layer)
        # past `__setattr__`, which decides for each name whether it is one of the base layer
        vars(self).update(
            {name: {} for name in self.other_param_names},
            lotra_spec=spec,
            lotra_tensor=coefficients,
            adapter_layer_names=COMPONENTS[: 1 + len(coefficients.shape)],
            lotra_lock=LayerLock(),
            lotra_formula=None,
            out_features=coefficients.shape[0],
            in_features=coefficients.shape[1],
            # flag to enable/disable casting of input to weight dtype during forward call
            cast_input_dtype_enabled=True,
            _disable_adapters=False,
            _active_adapter=adapter_name,
            _grid_watch=GridWatch(),
        )
        self._forget_merge()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        self.base_layer = base_layer
        self._look_at_base()
        self.update_layer(adapter_name, r=r, alpha=alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: Ranks, alpha: float, config: LoTRAConfig, **kwargs) -> None:
        """Internal function to create a LoTRA adapter, with ranks `r` capped by the sizes of the modes."""
        self._check_scale(alpha)
        shape = self.lotra_tensor.shape
        if config.adapt_residual and self.lotra_tensor.has_residual:
            shape = (*shape[:2], shape[2] + 1, *shape[3:])
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
        self._grid_watch.forget()
        # Drawn in the base's precision, but not in half of it; _move_adapter_to_device_of_base_layer casts down later.
        of_base = self.lotra_tensor.get_parameter(self.get_base_layer())
        dtype = torch.promote_types(of_base.dtype, torch.float32)
        # as PEFT's other methods, an adapter has values also where the base has none yet
        device = "cpu" if of_base.is_meta else of_base.device
        sizes = (ranks, *zip(shape, ranks, strict=True))
        for name, size in zip(self.adapter_layer_names, sizes, strict=True):
            self._modules[name][adapter_name] = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

        frozen, zero = config.frozen_and_zero([name.removeprefix("lotra_") for name in self.adapter_layer_names])
        self.lotra_frozen.pop(adapter_name, None)
        if frozen:
            self.lotra_frozen[adapter_name] = frozen
        components = self.get_components(adapter_name)
        is_new = config.checkpoint.layers is None  # the components of others are loaded next
        if config.init_weights == "gradient" and is_new:
            reset_components_from_gradient(*components, layer=self.get_base_layer(), zero=zero)
        elif config.init_weights == "hosvd" and is_new:
            reset_components_from_base(components, self._coefficients_before_merge(), zero)
        else:
            reset_components(*components, zero=zero if config.init_weights else None)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # set_adapter goes through all adapters: with it, loading a thousand would take a million steps
        trainable = adapter_name in self.active_adapters and not config.inference_mode
        for component in self.get_components(adapter_name):
            component.requires_grad_(trainable)
        self._freeze()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT puts new parameters into the places of those that are cast, which require a gradient
        here = bool(self._adapters_here([adapter_name]))
        flags = [component.requires_grad for component in self.get_components(adapter_name)] if here else []
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for component, flag in zip(self.get_components(adapter_name) if here else (), flags, strict=True):
            component.requires_grad_(flag)

    def _freeze(self) -> None:
        """Lets the components that are never trained require no gradient, whatever the state of their adapters."""
        for adapter, frozen in self.lotra_frozen.items():
            components = self.get_components(adapter)
            for name in frozen:
                getattr(components, name).requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Sets the active adapters, which are trainable apart from the components that their configs do not train."""
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters require a gradient, or not, apart from the components that their configs do not train."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def reset_lotra_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draws the components of an adapter anew; with `init_weights` the update is zero."""
        reset_components(*self.get_components(adapter_name), zero="factor_out" if init_weights else None)

    def get_components(self, adapter_name: str) -> Tucker:
        """The components of an adapter.

        Returns:
            `Tucker`: core (ro, ri, rb [, rk]), factor_out (out, ro), factor_in (in, ri), factor_basis (basis, rb), and
                factor_kernel (kernel, rk) where the layer has a kernel.
        """
        names = self.adapter_layer_names
        kind = Tucker if len(names) == len(Tucker._fields) else KernelTucker
        return kind(*(self._modules[name][adapter_name] for name in names))

    @torch.no_grad()
    def set_components(self, adapter_name: str, components: Tucker) -> None:
        """Overwrites the components of an adapter, in place."""
        for parameter, value in zip(self.get_components(adapter_name), components, strict=True):
            parameter.data.copy_(value)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale of an adapter to `scale` times its alpha."""
        if adapter in self.lotra_scaling:
            self.lotra_scaling[adapter] = self._check_scale(as_number(scale) * self.lotra_alpha[adapter])

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for adapter in self._adapters_here(self.active_adapters):
            self.lotra_scaling[adapter] = self._check_scale(self.lotra_scaling[adapter] * as_number(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters, or sets it back to alpha."""
        for adapter in self._adapters_here(self.active_adapters):
            if scale is None:
                self.lotra_scaling[adapter] = self.lotra_alpha[adapter]
            else:
                self.lotra_scaling[adapter] = self._check_scale(self.lotra_scaling[adapter] / as_number(scale or None))

    def _check_scale(self, scale: float) -> float:
        """Returns a scale that the dtype of the base layer can hold; a `ValueError` for any other."""
        dtype = self.lotra_tensor.get_parameter(self.get_base_layer()).dtype
        if not abs(scale) <= torch.finfo(dtype).max:  # nor NaN
            raise ValueError(
                f"An update of this {self.lotra_spec.family} layer would be scaled by {scale}, but its {dtype} holds "
                f"finite numbers up to {torch.finfo(dtype).max:.1e}: the outputs would be infinite or NaN. Choose a "
                "smaller `alpha` or scale."
            )
        return scale

    def _adapters_here(self, adapter_names: Iterable[str]) -> list[str]:
        scaling = self.lotra_scaling
        return [name for name in adapter_names if name in scaling]

    def get_base_layer(self) -> nn.Module:
        """The innermost base layer, under this layer and those of other methods."""
        layer = self._modules["base_layer"]
        while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
            layer = inner
        return layer

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # PEFT looks for `.weight`, which KAN layers do not have (or, inkan, only by accident)
        parameter = self.lotra_tensor.get_parameter(base_layer)
        return parameter.device, parameter.dtype

    def get_base_weight(self) -> torch.Tensor:
        """The coefficients of the base layer, (out, in, basis [, kernel]).

        The residual branch is the last slice of the basis mode.
        """
        return self.lotra_tensor.read(self.get_base_layer()).detach()

    def _coefficients_before_merge(self) -> torch.Tensor:
        """What `get_base_weight` returns while no adapter is merged."""
        layer, _, tensor = self.base_before_merge()
        kept = self.parameters_before_merge
        if self.merged and not kept:
            raise ValueError(
                '`init_weights="hosvd"` needs the coefficients of the base, which a merge with `keep_base=False` has '
                "changed. Call `unmerge_adapter` before the adapter is added."
            )
        parameters = {name: kept.get(name, value) for name, value in tensor.read_parameters(layer).items()}
        return tensor.join(list(parameters.values())).detach()

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Sets the coefficients of the base layer, laid out as in `get_base_weight`."""
        self._write({name: part.detach() for name, part in self.lotra_tensor.split(weight_data).items()})

    @property
    def weight(self) -> torch.Tensor:
        # inkan's layers have one, and PEFT's property would answer without the adapters
        return self.__getattr__("weight")

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update of an adapter, (out, in, basis [, kernel]).

        With `adapt_residual` the basis mode has one more slice, the residual branch.
        """
        return self._update(adapter).dense()

    def _update(self, adapter: str, dropout: bool = False) -> Update:
        """The update that an adapter makes; with `dropout` rank and module dropout are drawn for a training step."""
        components, scale = self.get_components(adapter), self.lotra_scaling[adapter]
        if not dropout:
            return Update(scale, components)
        # Drawn as tensors, not as Python branches: a compiled graph draws anew at each step.
        core = components.core
        if p := self.lotra_rank_dropout[adapter]:
            kept = torch.rand(len(core), *[1] * (core.dim() - 1), device=core.device) >= p
            components = components._replace(core=core * kept.to(core.dtype) / (1 - p))
        if p := self.lotra_module_dropout[adapter]:
            scale = scale * (torch.rand((), device=core.device) >= p).to(core.dtype)
        return Update(scale, components)

    @property
    def is_random(self) -> bool:
        """Whether a forward pass draws rank or module dropout."""
        adapters = self._adapters_here(self.active_adapters) if self.training else []
        return any(self.lotra_rank_dropout[name] or self.lotra_module_dropout[name] for name in adapters)

    def adapters_in_force(self) -> list[str]:
        """The adapters that a forward pass adds to the base layer: none while they are merged or disabled."""
        return [] if self.merged or self.disable_adapters else self._adapters_here(self.active_adapters)

    def updates_in_force(self) -> list[Update]:
        """The updates of the adapters in force, without dropout."""
        return [self._update(adapter) for adapter in self.adapters_in_force()]

    def parameters_in_force(self) -> dict[str, torch.Tensor]:
        """The adapted parameters of the base layer, as stored, by name; empty if no adapter is in force."""
        return self._parameters_with(self.updates_in_force())

    def coefficients_in_force(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The coefficients of the base layer with the updates in force, added in `dtype`; a tensor of its own.

        Args:
            dtype (`torch.dtype`, *optional*): Defaults to that of the base layer.

        Returns:
            `torch.Tensor`: (out, in, basis [, kernel]), or (out, in, basis + 1 [, kernel]) with the residual branch
                as the last slice of the basis mode.
        """
        coefficients = self.lotra_tensor.read(self.get_base_layer()).to(dtype, copy=True)
        updates = self.updates_in_force()
        with without_autocast(updates):
            for update in updates:
                delta = update.dense().to(dtype)
                coefficients[:, :, : delta.shape[2]] += delta
        return coefficients

    def _parameters_with(self, updates: Sequence[Update]) -> dict[str, torch.Tensor]:
        return add_updates(self.lotra_tensor, self._modules["base_layer"], updates)

    def _apply(self, fn, *args, **kwargs):
        # a grid that is cast is rounded, but has not moved
        grid = self.read_grid()
        same = [name for name, recorded in self.lotra_grid.items() if same_grid(recorded, grid)]
        as_merged = self.merged and same_grid(self._grid_at_merge, grid)
        super()._apply(fn, *args, **kwargs)
        self._grid_watch.forget()
        if not any(isinstance(value, torch.Tensor) and value.is_meta for value in grid.values()):  # `to_empty`
            grid = self.copy_grid()
            self.lotra_grid.update(dict.fromkeys(same, grid))
            if as_merged:
                self._grid_at_merge = grid
        return self

    def read_grid(self) -> Grid:
        """The state that gives the coefficients of the base layer their meaning, by name."""
        return self.lotra_spec.read_grid(self.get_base_layer())

    def copy_grid(self) -> Grid:
        """A copy of `read_grid()`."""
        grid = self.read_grid()
        return {name: v.detach().clone() if isinstance(v, torch.Tensor) else v for name, v in grid.items()}

    def _look_at_base(self, adapters: Iterable[str] = ()) -> None:
        """Checks the grid, and finds the formula again if the grid, dtype, device, mode or hooks have changed.

        Not inside of `torch.func`, where tensors have no content of their own, nor in a compiled graph.

        Raises:
            RuntimeError: The grid is not the one that the adapters were made on.
        """
        if torch.compiler.is_compiling():
            return
        spec, tensor, base_layer = self.lotra_spec, self.lotra_tensor, self._modules["base_layer"]
        grid = spec.read_grid(self.get_base_layer())
        if not self._grid_watch.look(base_layer, grid, tensor.get_parameter(base_layer)):
            return
        for adapter in adapters:
            if not self._grid_watch.is_equal(grid, self.lotra_grid[adapter]):
                raise self._moved_grid(adapter)
        if self._grid_watch.changed and not in_transform():
            self.lotra_formula = find_formula(base_layer, spec, tensor)
            self._grid_watch.changed = False

    def _moved_grid(self, adapter: str) -> RuntimeError:
        return RuntimeError(
            f"The grid of this {self.lotra_spec.family} layer was moved after the adapter {adapter!r} had "
            "been attached: its coefficients would mean other functions. Call `peft_lotra.refit_adapters` "
            "to carry the adapters over, or move the grid back."
        )

    @exclusively
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return super().state_dict(*args, **kwargs)

    @exclusively
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_forward_args(args, kwargs, adapter_names)
        disabled = self.disable_adapters
        if disabled and self.merged:
            self.unmerge()
        base_layer = self._modules["base_layer"]
        if disabled or self.merged:
            return base_layer(*args, **kwargs)
        if adapter_names is None:
            adapters = self._adapters_here(self.active_adapters)
            self._look_at_base(adapters)
            if adapters and is_tracing():
                refuse_trace(self.lotra_spec, self._modules["base_layer"])
            return self._run([self._update(name, self.training) for name in adapters], args, kwargs)
        names = adapter_names if isinstance(adapter_names, RowNames) else RowNames(adapter_names)
        adapters = self._adapters_here(names.distinct)
        self._look_at_base(adapters)
        updates = [[self._update(name, self.training)] if name in adapters else [] for name in names.distinct]
        return MixedBatch(names, self.lotra_tensor, self._run).output(base_layer, updates, *args, **kwargs)

    def _run(self, updates: Sequence[Update], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Evaluates the layer with these updates for all rows."""
        base_layer, formula = self._modules["base_layer"], self.lotra_formula
        by_rows = type(base_layer) is KANLinear and not self.training and in_transform()
        if updates and by_rows and not has_hooks(base_layer):
            # a gradient of the size of the coefficients for each row (`torch.func.vmap`) is avoided
            return base_layer(*args, **kwargs) + contract_updates(base_layer, list(updates), *args, **kwargs)
        if updates and formula is not None and formula.accepts(base_layer, updates, args, kwargs):
            return formula.output(base_layer, updates, *args)
        return call_with_parameters(base_layer, self._parameters_with(updates), base_layer, args, kwargs)

    def _check_forward_args(self, args: tuple, kwargs: dict, adapter_names: list[str]) -> None:
        """Raises a ValueError if the arguments do not fit each other, or the state of the layer."""
        x = args[0] if args else next(iter(kwargs.values()))
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:  # it is unclear what would be right
            msg = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            raise ValueError(msg)

    def __repr__(self) -> str:
        return "lotra." + super().__repr__()


def lotra_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoTRALayer]]:
    """The adapted layers of a model with their names, or those of them that have the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoTRALayer) and (adapter is None or adapter in module.lotra_core):
            yield name, module
