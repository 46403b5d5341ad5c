# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..kan.basis import in_transform
from ..layers.coefficients import CoefficientTensor
from ..layers.formula import FormulaReader, find_formula, state_of
from ..layers.registry import Grid, KANLayerSpec, copy_grid, same_grid
from ..modules.calls import (
    LayerLock,
    attribute_by,
    call_with_parameters,
    freeze_norms,
    is_tracing,
    loaded,
    places,
    without_autocast,
)
from ..tucker import COMPONENTS, Tucker, Update
from .by_row import FORWARD_PASS, ForwardPass, run_named_rows
from .config import LoTRAConfig
from .initialization import initialize


class Target(NamedTuple):
    """A KAN layer without adapters; its kind, and where its coefficients are."""

    layer: nn.Module
    spec: KANLayerSpec
    tensor: CoefficientTensor


class LoTRALayer(nn.Module, BaseTunerLayer):
    """
    A KAN layer with LoTRA adapters.

    The base layer itself runs with `parameter + update` as its parameters, which is exact for every kind of layer and
    keeps whatever the layer returns. Where the kind says how its basis is evaluated, the output is computed by its
    formula instead (formula.py).

    Attributes that this class does not have are those of the base layer, with the updates of the active adapters.
    `before_merge` has the parameters that merged adapters have changed, as they were, by name.

    Args:
        base_layer (`nn.Module`): The KAN layer.
        spec (`KANLayerSpec`): The description of its kind.
        tensor (`CoefficientTensor`): Where the base layer keeps its coefficients.
        name (`str`): The name of the layer in its model, for messages.
    """

    # All names of layers that may contain (trainable) adapter weights; a layer with a kernel has "lotra_factor_kernel"
    adapter_layer_names: tuple[str, ...] = COMPONENTS[:-1]
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        "lotra_r",
        "lotra_alpha",
        "lotra_scaling",
        "lotra_rank_dropout",
        "lotra_module_dropout",
    )
    lotra_r: dict[str, tuple[int, ...]]
    lotra_alpha: dict[str, float]
    lotra_scaling: dict[str, float]
    lotra_rank_dropout: dict[str, float]
    lotra_module_dropout: dict[str, float]
    _modules: dict[str, Any]

    def __init__(self, base_layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor, name: str) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        # past `__setattr__`, which passes on what the base layer has
        vars(self).update(
            {entry: {} for entry in self.other_param_names},
            lotra_name=name,
            lotra_spec=spec,
            lotra_tensor=tensor,
            adapter_layer_names=COMPONENTS[: 1 + len(tensor.shape)],
            frozen_peft_weight_names={},
            out_features=tensor.shape[0],
            in_features=tensor.shape[1],
            cast_input_dtype_enabled=True,  # PEFT switches it
            merged_adapters=[],
            _disable_adapters=False,
            _active_adapter=[],
            _lock=LayerLock(),
            before_merge={},
            _base_type=type(base_layer),
            _has_seen_inputs=False,
        )
        for component in self.adapter_layer_names:
            self._modules[component] = nn.ParameterDict()
        self.accept_grid()
        tensor.read_parts(base_layer)  # computes cached properties, which a compiler cannot
        self._find_formula(tensor.get_parameter(base_layer), is_new=True)

    def update_layer(self, adapter_name: str, config: LoTRAConfig) -> None:
        """Adds an adapter."""
        shapes = config.component_shapes(self.lotra_name, self.lotra_tensor)
        self.lotra_r[adapter_name] = shapes["core"]
        self.lotra_alpha[adapter_name] = self.lotra_scaling[adapter_name] = config.alpha_of(self.lotra_name)
        self.lotra_rank_dropout[adapter_name] = config.rank_dropout
        self.lotra_module_dropout[adapter_name] = config.module_dropout
        # drawn in the base's dtype, in float32 for half precision; cast below
        stored = self.lotra_tensor.get_parameter(self.get_base_layer())
        dtype = torch.promote_types(stored.dtype, torch.float32)
        for name, shape in shapes.items():
            part = nn.Parameter(torch.empty(shape, dtype=dtype, device=stored.device))
            self._modules[f"lotra_{name}"][adapter_name] = part
        frozen, zero = config.frozen_and_zero(shapes)
        if frozen:
            self.frozen_peft_weight_names[adapter_name] = tuple(f"lotra_{name}" for name in frozen)
        # values of a file replace those drawn here
        start = bool(config.init_weights) if config.is_from_file else config.init_weights
        source = self.get_base_weight() if start == "hosvd" else None
        initialize(self.get_components(adapter_name), start, zero, source)
        if stored.dtype != dtype:
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self._active_adapter = self._active_adapter or [adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT looks for `.weight`, which KAN layers do not have, and makes parameters that require gradients
        if adapter_name in self.lotra_r:
            stored = self.lotra_tensor.get_parameter(self.get_base_layer())
            for part in self.get_components(adapter_name)._asdict().values():
                if not part.is_meta:
                    part.data = part.data.to(device or stored.device, stored.dtype)

    # --- what an adapter is ---

    def get_components(self, adapter_name: str) -> Tucker:
        """The components of an adapter.

        Returns:
            `Tucker`: core (ro, ri, rb [, rk]), factor_out (out, ro), factor_in (in, ri), factor_basis (basis, rb), and
                factor_kernel (kernel, rk) where the layer has a kernel. None for the factor of a full mode.
        """
        modules = self._modules
        components = [getattr(modules[name], adapter_name, None) for name in self.adapter_layer_names]
        return tuple.__new__(Tucker, components)  # for each forward pass: without the Python call of `Tucker.__new__`

    @torch.no_grad()
    def set_components(self, adapter_name: str, components: Tucker) -> None:
        """Overwrites the components of an adapter, in place."""
        for name, parameter in self.get_components(adapter_name)._asdict().items():
            parameter.data.copy_(getattr(components, name))

    def replace_components(self, adapter_name: str, components: Tucker) -> None:
        """Gives an adapter other components, perhaps of other ranks, as new parameters."""
        core = self.get_components(adapter_name).core
        for name, value in zip(self.adapter_layer_names, components, strict=True):
            former = getattr(self._modules[name], adapter_name, None)
            if value is not None:
                requires_grad = (core if former is None else former).requires_grad
                # products of other strides have other last digits: a file would not restore the outputs
                value = value.detach().contiguous()
                self._modules[name][adapter_name] = nn.Parameter(value, requires_grad=requires_grad)
            elif former is not None:
                del self._modules[name][adapter_name]
        self.lotra_r[adapter_name] = components.ranks

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update of an adapter, (out, in, basis [, kernel]).

        With `adapt_residual` the basis mode has one more slice, the residual branch.
        """
        return self.update_of(adapter).dense()

    def get_base_layer(self) -> nn.Module:
        """The innermost base layer, under this layer and those of other methods."""
        layer = self._modules["base_layer"]
        while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
            layer = inner
        return layer

    def get_base_weight(self) -> torch.Tensor:
        """The coefficients of the base layer, (out, in, basis [, kernel]).

        The residual branch is the last slice of the basis mode.
        """
        return self.lotra_tensor.read(self.get_base_layer()).detach()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale of an adapter to `scale` times its alpha."""
        if adapter in self.lotra_scaling:
            self.lotra_scaling[adapter] = scale * self.lotra_alpha[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for adapter in self._present(self.active_adapters):
            self.lotra_scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters, or sets it back to alpha."""
        for adapter in self._present(self.active_adapters):
            alpha, present = self.lotra_alpha[adapter], self.lotra_scaling[adapter]
            self.lotra_scaling[adapter] = alpha if scale is None else present / scale

    def _present(self, adapter_names: Iterable[str]) -> list[str]:
        return [name for name in adapter_names if name in self.lotra_scaling]

    def update_of(self, adapter: str, dropout: bool = False) -> Update:
        """The update that an adapter makes; with `dropout`, rank and module dropout are drawn for a training step."""
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
        adapters = self._present(self.active_adapters) if self.training else []
        return any(self.lotra_rank_dropout[name] or self.lotra_module_dropout[name] for name in adapters)

    def applied_updates(self) -> list[Update]:
        """The updates that a forward pass adds to the base layer: none while they are merged or disabled."""
        names = [] if self.merged or self.disable_adapters else self._present(self.active_adapters)
        return [self.update_of(name) for name in names]

    def effective_parameters(self) -> dict[str, torch.Tensor]:
        """The adapted parameters of the base layer with the applied updates, as stored, by name."""
        return self._parameters_with(self.applied_updates())

    def effective_coefficients(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The coefficients of the base layer with the applied updates, added in `dtype`; a tensor of its own.

        Returns:
            `torch.Tensor`: (out, in, basis [, kernel]), or (out, in, basis + 1 [, kernel]) with the residual branch
                as the last slice of the basis mode.
        """
        coefficients = self.lotra_tensor.read(self.get_base_layer()).to(dtype, copy=True)
        with without_autocast(coefficients):
            for update in self.applied_updates():
                delta = update.dense().to(coefficients.dtype)
                coefficients[:, :, : delta.shape[2]] += delta
        return coefficients

    def _parameters_with(self, updates: Sequence[Update]) -> dict[str, torch.Tensor]:
        """The parameters of the base layer that the updates reach, as stored, with the updates added, by name.

        Raises:
            RuntimeError: A parameter is sharded, and the updates are not.
        """
        parameters: dict[str, torch.Tensor] = {}
        if not updates:
            return parameters
        base_layer = self.get_base_layer()
        with without_autocast(updates[0].tensor.core):
            for update in updates:
                for name, part in self.lotra_tensor.split(update.dense()).items():
                    path, _, leaf = name.rpartition(".")
                    owner = base_layer.get_submodule(path)
                    is_stored = leaf in owner._parameters or leaf in vars(owner)
                    stored = parameters[name] if name in parameters else getattr(owner, leaf)
                    is_sharded = hasattr(stored, "placements") != hasattr(part, "placements")
                    if not is_stored or is_sharded or stored.shape != part.shape:
                        raise RuntimeError(
                            f"`{name}` of `{self.lotra_name}` is sharded or parametrized, and its adapters are not. "
                            "Shard the LoTRALayer, or a module around it, but not the base layer inside."
                        )
                    parameters[name] = torch.add(stored, part).to(stored.dtype)
        return parameters

    # --- the grid ---

    def accept_grid(self) -> None:
        """Take the present grid for the grid of the adapters; the layer may have another formula on it."""
        vars(self).update(lotra_grid=self.copy_grid(), _grid_state=None, _formulas={})

    @property
    def unadapted(self) -> nn.Module:
        """For `refine_grid`: the base layer to refine, or the layer itself while merged, which is then refused."""
        return self if self.merged else self._modules["base_layer"]

    @torch.no_grad()
    def carry_to(self, layer: nn.Module, transfer: torch.Tensor) -> None:
        """Puts a layer on another grid in the place of the base layer, and expresses all adapters on it.

        Args:
            layer: The layer, of the same kind.
            transfer: (K', K), the basis functions of the base layer as sums of those of the new one, at each input.
        """
        layer.train(self._modules["base_layer"].training)
        vars(self).update(lotra_tensor=self.lotra_spec.locate(layer), _base_type=type(layer))
        self._modules["base_layer"] = layer
        self.accept_grid()
        for adapter in self.lotra_r:
            components = self.get_components(adapter)
            residual = transfer.new_ones(components.shape[2] - transfer.shape[1]).diag()  # which stays
            self.replace_components(adapter, components.on_basis(torch.block_diag(transfer, residual)))

    def copy_grid(self) -> Grid:
        return copy_grid(self.lotra_spec.read_grid(self.get_base_layer()))

    def check_grid(self, args: tuple = ()) -> None:
        """Raise a RuntimeError if the grid has moved since the adapters were made.

        Warn if most of the first inputs, `args[0]`, lie far outside of the grid.
        """
        if args and not self._has_seen_inputs:
            self._has_seen_inputs = True
            warn_of_far_inputs(self.lotra_name, self.lotra_grid, self.lotra_tensor.shape, args[0])
        grid = self.lotra_spec.read_grid(self.get_base_layer())
        # comparing contents would wait for an accelerator
        state = tuple(
            (id(v), v._version, v.data_ptr())
            for v in grid.values()
            if isinstance(v, torch.Tensor) and v.device.type != "cpu" and not v.is_inference()
        )
        if state and state == self._grid_state:
            return
        if any(isinstance(v, torch.Tensor) and v.is_meta for v in self.lotra_grid.values()):
            self.lotra_grid = self.copy_grid()  # there were no values when the adapters were attached
        if not same_grid(self.lotra_grid, grid):
            raise RuntimeError(
                f"The grid of `{self.lotra_name}` ({self.lotra_spec.family}) was moved after its adapters had been "
                "attached, which gives them another meaning. Move it back, or carry them over by "
                "`peft_lotra.refit_adapters(model, inputs, move)`."
            )
        if state:
            self._grid_state = state

    # --- the forward pass ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a hook of accelerate, to load what it has offloaded; `loaded` takes it away for the inner call
        if "forward" in vars(self._modules["lotra_core"]):
            with loaded(self):
                return self.forward(*args, **kwargs)
        is_traced = is_tracing()
        current = None if is_traced else FORWARD_PASS.now.get() or FORWARD_PASS.get()  # the first without a call
        names = kwargs.pop("adapter_names", None)
        if names is None and current is not None:
            names = current.names
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if names is not None and self.merged_adapters:
            msg = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            raise ValueError(msg)
        if self._disable_adapters or self.merged_adapters:
            return self._call_base([], args, kwargs)
        if not (is_traced or in_transform()):  # where tensors have no content
            self.check_grid(args)
        if names is None:
            return self._run(self.active_adapters, current, args, kwargs)
        return run_named_rows(self, names, current, args, kwargs)

    def _run(self, adapters: Iterable[str], current: ForwardPass | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Evaluates the layer with these adapters, those of them that it has, for all rows."""
        updates = self._updates(adapters, current)
        if updates:
            base_layer = self._modules["base_layer"]
            stored = self.lotra_tensor.get_parameter(base_layer)
            reader = self._find_formula(stored)
            if reader is not None and reader.accepts(base_layer, stored, updates, args, kwargs):
                return reader.read(base_layer)._replace(updates=tuple(updates)).output(*args)
        return self._call_base(updates, args, kwargs)

    def _updates(self, adapters: Iterable[str], current: ForwardPass | None) -> list[Update]:
        """Return the updates of the adapters that the layer has, as they were when the pass began."""
        names = self._present(adapters)
        updates = [self.update_of(name, self.training) for name in names]
        if current is not None and current.replaced:  # read after the components were, see `hotswap_adapter`
            former = [current.replaced.get((id(self), name)) for name in names]
            updates = [update._replace(tensor=f or update.tensor) for update, f in zip(updates, former, strict=True)]
        return updates

    def _call_base(self, updates: Sequence[Update], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the base layer with the updates added to its parameters, one thread at a time."""
        base_layer = self._modules["base_layer"]
        is_traced = is_tracing()
        with nullcontext() if is_traced else self._lock, loaded(self) if updates and not is_traced else nullcontext():
            return call_with_parameters(base_layer, self._parameters_with(updates), base_layer, args, kwargs)

    def _find_formula(self, stored: torch.Tensor, is_new: bool = False) -> FormulaReader | None:
        """The formula of the base layer in its present mode and dtype, found in its first eager pass."""
        base_layer = self._modules["base_layer"]
        if type(base_layer) is not self._base_type:  # FSDP has wrapped it, or `call_with_parameters` is at work
            return None
        key = base_layer.training, stored.dtype
        state, reader = self._formulas.get(key, (None, None))
        if (reader is not None and reader.is_own) or (not is_new and (is_tracing() or in_transform())):
            return reader  # in transforms nothing can be compared
        present = state_of(base_layer)
        if state != present:
            reader = find_formula(base_layer, self.lotra_spec, self.lotra_tensor)
            if reader is not None and reader.is_own:  # in all modes
                self._formulas[not base_layer.training, stored.dtype] = present, reader
            self._formulas[key] = present, reader
        return reader

    # --- merging ---

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merges the active adapters, or those named, into the parameters of the base layer.

        Args:
            safe_merge (`bool`, *optional*): Whether to check first that the merged weights are finite.
            adapter_names (`list[str]`, *optional*): The adapters to merge; defaults to all that are active.

        Raises:
            ValueError: `safe_merge`, and the merged weights are not finite. The base weights are unchanged.
            RuntimeError: The grid is not the one that the adapters were made on.
        """
        names = self._present(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        self.check_merge(names, safe_merge)
        if names:
            with self._lock, torch.no_grad():
                if not self.merged_adapters:
                    self.before_merge = {n: value.detach().clone() for n, value in self._base_parameters().items()}
                self._add([self.update_of(name) for name in names])
                self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Raises what `merge` would raise, and a ValueError for parameters that are computed from others."""
        base_layer = self.get_base_layer()
        if not adapter_names:  # nothing to merge: the grid may have moved since
            return
        self.check_grid()
        for parameter in self.lotra_tensor.parameters if "core" not in base_layer._parameters else ():
            check_stored(self.lotra_name, base_layer, parameter)
        updates: list[Update] = []
        for name in adapter_names if safe_merge else ():
            updates.append(self.update_of(name))
            values = (updates[-1].dense(), *self._parameters_with(updates).values())  # of a Slim layer: components
            if not all(value is None or value.isfinite().all() for value in values):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def unmerge(self) -> None:
        """
        Undoes all merges: the base layer has its own parameters again, bit for bit from the copy that a merge keeps.

        Raises:
            RuntimeError: The grid was moved after the merge: the coefficients multiply other functions.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_grid()
        with self._lock, torch.no_grad():
            self._write(self.before_merge)
            self.before_merge, self.merged_adapters = {}, []

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that a merge changes, by name."""
        return self.lotra_tensor.read_parameters(self.get_base_layer())

    def _add(self, updates: Sequence[Update]) -> None:
        self._write(self._parameters_with(updates))

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        base_layer = self.get_base_layer()
        for name, value in values.items():
            parameter = attrgetter(name)(base_layer)
            if 0 in parameter.stride():  # an expanded one, whose rows share their memory
                parameter.data = value.to(parameter, copy=True)
            else:
                parameter.data.copy_(value)

    def base_before_merge(self) -> Target:
        """The base layer without its adapters."""
        return Target(self._modules["base_layer"], self.lotra_spec, self.lotra_tensor)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters merged or not, and with the trained copies of modules inside of it."""
        if merge:
            self.merge(adapter_names=adapter_names)  # what `safe_merge` asks for was checked
        base_layer = self.get_base_layer()
        for parent, name, child in places(base_layer):
            if isinstance(child, ModulesToSaveWrapper):
                parent._modules[name] = child.unload_and_optionally_merge_module(False, False, None)
        return base_layer

    # --- the module ---

    def train(self, mode: bool = True) -> LoTRALayer:
        super().train(mode)
        freeze_norms(self)
        return self

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> LoTRALayer:
        grid = self.lotra_spec.read_grid(self.get_base_layer())
        # a grid that is cast is rounded, but has not moved; one on the meta device has no values yet
        is_same = same_grid(self.lotra_grid, grid) and not any(
            isinstance(value, torch.Tensor) and value.is_meta for value in grid.values()
        )
        super()._apply(fn, *args, **kwargs)
        self.before_merge = {name: fn(value) for name, value in self.before_merge.items()}
        if is_same:
            self.lotra_grid = self.copy_grid()
        self._grid_state = None
        return self

    @property
    def weight(self) -> torch.Tensor:
        # inkan's layers have one, and PEFT's property would answer without the adapters
        return self.__getattr__("weight")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # networks of other libraries read attributes of their layers
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        base_layer = self._modules["base_layer"]
        if name in self.lotra_spec.grid_methods and not self.merged and self.lotra_r:
            getattr(base_layer, name)  # an AttributeError if the base layer does not have it either
            return partial(refuse_grid_change, name)
        return attribute_by(self._with_effective_parameters, base_layer, name, self.lotra_tensor.parameters)

    def _with_effective_parameters(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function while the base layer has the updates of the applied adapters."""
        with self._lock:
            return call_with_parameters(self.base_layer, self.effective_parameters(), function, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # A parent that sets `layer.grid` means the base layer. Names with an underscore belong to frameworks
        # (accelerate, FSDP), which set them on each module for themselves.
        modules = self.__dict__.get("_modules", {})
        base_layer = modules.get("base_layer")
        is_known = name.startswith("_") or name in modules or name in self.__dict__ or hasattr(type(self), name)
        if base_layer is None or is_known or not hasattr(base_layer, name):
            super().__setattr__(name, value)
            return
        if name in self.lotra_spec.grid and not self.merged and self.lotra_r:
            refuse_grid_change(name)
        setattr(base_layer, name, value)

    def __repr__(self) -> str:
        return "lotra." + super().__repr__()


def check_stored(name: str, layer: nn.Module, parameter: str) -> nn.Module:
    """Return the module that owns a parameter, which must not be computed from others.

    A parametrization or a pre-hook computes it. The views of FSDP are attributes too, without a pre-hook.
    """
    path, _, leaf = parameter.rpartition(".")
    owner = layer.get_submodule(path)
    if is_parametrized(owner, leaf) or (leaf not in owner._parameters and owner._forward_pre_hooks):
        raise ValueError(
            f"`{parameter}` of `{name}` is computed from other parameters in each forward pass (pruning, "
            "weight_norm), so that an adapter would have no effect. Remove the reparametrization first."
        )
    return owner


def refuse_grid_change(name: str, *args: Any, **kwargs: Any) -> None:
    """Raise the error of a call that changes what the coefficients mean."""
    raise RuntimeError(
        f"`{name}` would change what the coefficients of the adapters mean. Merge them first (`merge_and_unload()`), "
        "or pass a move of the grid alone to `peft_lotra.refit_adapters(model, inputs, move)`."
    )


def further_names(model: nn.Module) -> dict[str, str]:
    """The further names of adapted layers that a model has in several places; for each, the first one."""
    first: dict[nn.Module, str] = {}
    layers = ((n, it) for n, it in model.named_modules(remove_duplicate=False) if isinstance(it, LoTRALayer))
    return {name: first[layer] for name, layer in layers if first.setdefault(layer, name) != name}


def grid_ends(grid: Grid, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return both ends (in,) of the grid of each input of a layer (out, in, basis); None if it is no tensor by input.

    The knots of B-splines beyond the grid are left out.
    """
    _, in_features, num_basis = shape[:3]
    for knots in grid.values():
        if isinstance(knots, torch.Tensor) and knots.dim() == 2 and len(knots) == in_features:
            knots = knots.detach().sort(dim=1).values
            beyond = max(0, knots.shape[1] - num_basis - 1)  # the order of the splines
            return knots[:, beyond], knots[:, -1 - beyond]
    return None


def warn_of_far_inputs(name: str, grid: Grid, shape: Sequence[int], x: Any) -> None:
    """Warn if most inputs of a layer (out, in, basis) lie further from its grid than it is long."""
    ends = grid_ends(grid, shape)
    if ends is None or not isinstance(x, torch.Tensor) or x.shape[-1:] != (shape[1],) or x.is_meta:
        return
    low, high = ends
    if ((x.detach() - (low + high) / 2).abs() > 1.5 * (high - low)).double().mean() > 0.5:
        warnings.warn(
            f"Most inputs of `{name}` lie far outside of its grid, from {low.min():.3g} to {high.max():.3g}, where "
            "splines are zero. Scale the inputs to the grid.",
            stacklevel=2,
        )


def check_unmerged(model: nn.Module) -> None:
    """Raises a ValueError if adapters are merged into the model."""
    if merged := [name for name, layer in lotra_layers(model) if layer.merged]:
        raise ValueError(f"The adapters of {', '.join(merged[:3])} are merged: call `unmerge_adapter` first.")


def lotra_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoTRALayer]]:
    """Iterate over the adapted layers of a model with their names, or over those that have the adapter."""
    # in the order of `named_modules`, which would go through the modules of the layers too
    modules: list[tuple[str, nn.Module | None]] = [("", model)]
    seen: set[nn.Module] = set()
    while modules:
        name, module = modules.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if not isinstance(module, LoTRALayer):
            children = [(f"{name}.{key}" if name else key, child) for key, child in module._modules.items()]
            modules += reversed(children)
        elif adapter is None or adapter in module.lotra_r:
            yield name, module
