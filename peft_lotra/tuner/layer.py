# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..kan.basis import in_transform
from ..kan.formula import LayerFormula
from ..kan.update_product import compute_output
from ..layers.coefficients import CoefficientTensor
from ..layers.formula import FormulaReader, find_formula, state_of
from ..layers.kinds import Grid, KANLayerSpec, copy_grid, same_grid
from ..modules.calls import (
    LayerLock,
    call_with_parameters,
    freeze_norms,
    is_tracing,
    loaded,
    places,
    read_attribute,
    without_autocast,
)
from ..tucker import COMPONENTS, Tucker, Update
from .by_row import FORWARD_PASS, ForwardPass, run_named_rows
from .config import LoTRAConfig
from .grids import holds_meta_tensors, refuse_grid_change, warn_of_far_inputs
from .initialization import initialize


Tensors = dict[str, Tensor]  # by name


class Target(NamedTuple):
    """A KAN layer without adapters, its kind, and the location of its coefficients."""

    layer: nn.Module
    spec: KANLayerSpec
    tensor: CoefficientTensor


Targets = dict[str, Target]  # by the name of the layer
Record = Mapping[str, Any]  # the entry of a layer in a file, see `record_layer`


class LoTRALayer(nn.Module, BaseTunerLayer):
    """
    Holds a KAN layer of the base and its LoTRA adapters, and computes with the active ones.

    It computes the base layer with the coefficients `A + sum of scale * update`, over the active adapters. A layer
    whose formula is known evaluates the updates as thin products. Any other base layer runs with the sums in place of
    its parameters.

    Attributes that this class lacks are read from the base layer, with the updates of the active adapters.

    Args:
        base_layer (`nn.Module`): The KAN layer.
        spec (`KANLayerSpec`): The description of its kind.
        tensor (`CoefficientTensor`): The location of its coefficients.
        name (`str`): The name of the layer in its model, for messages.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, LoTRALayer
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 8, 1]), LoTRAConfig(r=2))
        >>> layers = [layer for layer in model.modules() if isinstance(layer, LoTRALayer)]
        >>> [layer.get_delta_weight("default").shape for layer in layers]
        [torch.Size([8, 2, 9]), torch.Size([1, 8, 9])]

    **Attributes**:
        - **before_merge** (`dict[str, torch.Tensor]`) -- The parameters of the base layer before the first merge.
    """

    # All names of layers that may contain (trainable) adapter weights; convolutions also have "lotra_factor_kernel"
    adapter_layer_names: tuple[str, ...] = COMPONENTS[:-1]
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        "lotra_r",
        "lotra_alpha",
        "lotra_scaling",
    )
    cast_input_dtype_enabled: bool = True  # switched by PEFT
    lotra_spec: KANLayerSpec
    lotra_tensor: CoefficientTensor
    _modules: dict[str, Any]

    def __init__(
        self,
        base_layer: nn.Module,
        spec: KANLayerSpec,
        tensor: CoefficientTensor,
        name: str,
    ) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        count = 1 + len(tensor.shape)  # the core, and a factor for each mode
        # not by assignment: `__setattr__` would write attributes that the base layer has into it, and is slow
        vars(self).update(
            adapter_layer_names=COMPONENTS[:count],
            frozen_peft_weight_names={},
            lotra_r={},
            lotra_alpha={},
            lotra_scaling={},
            lotra_name=name,
            lotra_spec=spec,
            lotra_tensor=tensor,
            out_features=tensor.shape[0],
            in_features=tensor.shape[1],
            merged_adapters=[],
            before_merge={},
            _merged_updates=[],
            _merged_checksum=0,
            _active_adapter=[],
            _disable_adapters=False,
            _lock=LayerLock(),
            _base_type=type(base_layer),
            _has_seen_inputs=False,
        )

        for component in self.adapter_layer_names:
            self._modules[component] = nn.ParameterDict()
        self.remember_grid()
        # compiled code cannot look for it
        self._find_reader(tensor.get_parameter(base_layer), even_if_traced=True)

    def update_layer(self, adapter_name: str, config: LoTRAConfig) -> None:
        """Add an adapter."""
        shapes = config.shapes_of(self.lotra_name, self.lotra_tensor)
        alpha = config.alpha_of(self.lotra_name)
        self.lotra_r[adapter_name] = shapes["core"]
        self.lotra_alpha[adapter_name] = alpha
        self.lotra_scaling[adapter_name] = alpha

        # of a base in half precision, the components are drawn in float32, and cast at the end
        stored = self.lotra_tensor.get_parameter(self.get_base_layer())
        dtype = torch.promote_types(stored.dtype, torch.float32)
        for name, shape in shapes.items():
            component = torch.empty(shape, dtype=dtype, device=stored.device)
            self._modules[f"lotra_{name}"][adapter_name] = nn.Parameter(component)
        frozen, zero = config.frozen_and_zero(shapes)
        if frozen:
            self.frozen_peft_weight_names[adapter_name] = tuple(f"lotra_{name}" for name in frozen)

        start = config.init_weights
        if config.is_from_file:
            # The file replaces these values: a random start (True) will do, and takes less time than an HOSVD.
            start = bool(start)
        coefficients = self.get_base_weight() if start == "hosvd" else None
        initialize(self.get_components(adapter_name), start, zero, coefficients)
        if stored.dtype != dtype:
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        stored = self.lotra_tensor.get_parameter(base_layer)
        return stored.device, stored.dtype

    # --- the components of an adapter, and its update ---

    def get_components(self, adapter_name: str) -> Tucker:
        """Return the components of an adapter.

        Returns:
            `Tucker`: core (ro, ri, rb [, rk]), factor_out (out, ro), factor_in (in, ri), factor_basis (basis, rb), and
                for convolutions factor_kernel (kernel, rk). The factor of a full mode is None.
        """
        modules = self._modules
        components = [getattr(modules[name], adapter_name, None) for name in self.adapter_layer_names]
        return tuple.__new__(Tucker, components)  # avoids a Python call in each forward pass

    @torch.no_grad()
    def set_components(self, adapter_name: str, components: Tucker) -> None:
        """Overwrite the components of an adapter in place."""
        for name, parameter in self.get_components(adapter_name)._asdict().items():  # without those of full modes
            parameter.data.copy_(getattr(components, name))

    def replace_components(self, adapter_name: str, components: Tucker) -> None:
        """Replace the components of an adapter by new parameters, whose ranks may differ."""
        present = self.get_components(adapter_name)
        for name, former, value in zip(self.adapter_layer_names, present, components, strict=True):
            if value is not None:
                # the new factor of a mode that was full trains if the core does
                requires_grad = (present.core if former is None else former).requires_grad
                # other strides would change the last digits, which a file could not restore
                value = value.detach().contiguous()
                self._modules[name][adapter_name] = nn.Parameter(value, requires_grad=requires_grad)
            elif former is not None:
                del self._modules[name][adapter_name]
        self.lotra_r[adapter_name] = components.ranks

    def update_of(self, adapter: str) -> Update:
        """Return the update of an adapter: its scale and its components."""
        return Update(self.lotra_scaling[adapter], self.get_components(adapter))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of an adapter, (out, in, basis [, kernel]).

        With `adapt_residual` the last slice of the basis mode is the base branch.
        """
        return self.update_of(adapter).dense()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to `scale` times its alpha."""
        if adapter in self.lotra_scaling:
            self.lotra_scaling[adapter] = scale * self.lotra_alpha[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for adapter in self._available(self.active_adapters):
            self.lotra_scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; without an argument, reset them to alpha."""
        for adapter in self._available(self.active_adapters):
            if scale is None:
                self.lotra_scaling[adapter] = self.lotra_alpha[adapter]
            else:
                self.lotra_scaling[adapter] /= scale

    def _available(self, adapters: Iterable[str]) -> list[str]:
        return [name for name in adapters if name in self.lotra_scaling]

    def applied_updates(self) -> list[Update]:
        """Return the updates that a forward pass adds: none while they are merged or disabled."""
        if self.merged or self.disable_adapters:
            return []
        return [self.update_of(name) for name in self._available(self.active_adapters)]

    # --- the coefficients ---

    def get_base_layer(self) -> nn.Module:
        """Return the innermost base layer, under this layer and layers of other methods."""
        layer = self._modules["base_layer"]
        while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
            layer = inner
        return layer

    def get_base_weight(self) -> Tensor:
        """Return the coefficients of the base layer, (out, in, basis [, kernel]).

        The base branch is the last slice of the basis mode.
        """
        return self.lotra_tensor.read(self.get_base_layer()).detach()

    def effective_coefficients(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of the coefficients with the applied updates, added in `dtype`.

        Returns:
            `torch.Tensor`: (out, in, basis [, kernel]), or (out, in, basis + 1 [, kernel]) with the base branch
                as the last slice of the basis mode.
        """
        stored = self.lotra_tensor.read(self.get_base_layer())
        coefficients = stored.to(dtype, copy=True)
        self.add_updates(coefficients)
        return coefficients

    def add_updates(self, coefficients: Tensor) -> None:
        """Add the applied updates, in place and in the dtype of the coefficients."""
        with without_autocast(coefficients):
            for update in self.applied_updates():
                delta = update.dense().to(coefficients.dtype)
                # an update without `adapt_residual` lacks the base branch, which is the last slice
                coefficients[:, :, : delta.shape[2]] += delta

    def effective_parameters(self) -> Tensors:
        """Return the adapted parameters of the base layer with the applied updates, as stored, by name."""
        return self._parameters_with(self.applied_updates())

    def _parameters_with(self, updates: Sequence[Update]) -> Tensors:
        """Return `parameter + updates` for each parameter that the updates reach, as stored, by name.

        Raises:
            RuntimeError: A parameter is sharded, and the updates are not.
        """
        parameters = {}
        if not updates:
            return parameters
        base_layer = self.get_base_layer()
        with without_autocast(updates[0].tensor.core):
            for update in updates:
                for name, delta in self.lotra_tensor.split(update.dense()).items():
                    path, _, leaf = name.rpartition(".")
                    owner = base_layer.get_submodule(path)
                    is_stored = leaf in owner._parameters or leaf in vars(owner)
                    stored = parameters[name] if name in parameters else getattr(owner, leaf)
                    # one is a DTensor and the other is not; else FSDP has removed the parameter, or flattened it
                    is_sharded = hasattr(stored, "placements") != hasattr(delta, "placements")
                    if is_sharded or not is_stored or stored.shape != delta.shape:
                        raise RuntimeError(
                            f"`{name}` of `{self.lotra_name}` is sharded, and its adapters are not. Shard the "
                            "LoTRALayer, or a module around it."
                        )
                    parameters[name] = torch.add(stored, delta).to(stored.dtype)
        return parameters

    # --- the grid ---

    def remember_grid(self) -> None:
        """Take the present grid as the one that the adapters are made for. The formula is verified again."""
        vars(self).update(lotra_grid=self.copy_grid(), _grid_state=[], _readers={})

    def copy_grid(self) -> Grid:
        return copy_grid(self.lotra_spec.read_grid(self.get_base_layer()))

    def check_grid(self, args: tuple = ()) -> None:
        """Raise a RuntimeError if the grid has moved since the adapters were made.

        Warn if most of the first inputs, `args[0]`, lie far outside of the grid.
        """
        grid = self.lotra_spec.read_grid(self.get_base_layer())
        if args and not self._has_seen_inputs:
            self._has_seen_inputs = True
            # not the remembered grid, which has no values if the layer was on the meta device
            warn_of_far_inputs(self.lotra_name, grid, self.lotra_tensor.shape, args[0])
        state = []
        for value in grid.values():
            # comparing values would wait for an accelerator, where versions tell whether they changed
            if isinstance(value, Tensor) and value.device.type != "cpu" and not value.is_inference():
                state.append((id(value), value._version, value.data_ptr()))
        if state and state == self._grid_state:
            return
        if holds_meta_tensors(self.lotra_grid):  # there were no values yet
            self.lotra_grid = copy_grid(grid)
        if not same_grid(self.lotra_grid, grid):
            raise RuntimeError(
                f"The grid of `{self.lotra_name}` ({self.lotra_spec.kind}) was moved after its adapters had been "
                "attached, so their coefficients describe different functions. Move it back and merge them "
                "(`merge_and_unload()`), move the grid, and adapt the model again."
            )
        if state:
            self._grid_state = state

    @property
    def base_to_refine(self) -> nn.Module:
        """The base layer that `refine_grid` may refine; while merged, this layer, which it refuses."""
        return self if self.merged else self._modules["base_layer"]

    @torch.no_grad()
    def move_to_grid(self, layer: nn.Module, transfer: Tensor) -> None:
        """Replace the base layer by one on another grid, and express all adapters on that grid.

        Args:
            layer: The layer, of the same kind.
            transfer: (K', K), the old basis functions as sums of the new ones, the same for all inputs.
        """
        layer.train(self._modules["base_layer"].training)
        self._modules["base_layer"] = layer
        self._base_type = type(layer)
        self.lotra_tensor = self.lotra_spec.locate(layer)
        self.remember_grid()
        for adapter in self.lotra_r:
            components = self.get_components(adapter)
            residual_size = components.shape[2] - transfer.shape[1]
            identity = torch.eye(residual_size).to(transfer)  # the base branch stays
            components = components.on_basis(torch.block_diag(transfer, identity))
            self.replace_components(adapter, components)

    # --- the forward pass ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate sets `forward` of modules whose tensors it offloads. `loaded` loads them, and removes this
        # attribute, so that the inner call goes on behind this line.
        if "forward" in vars(self._modules["lotra_core"]):
            with loaded(self):
                return self.forward(*args, **kwargs)
        is_traced = is_tracing()
        current = None
        if not is_traced:
            # `FORWARD_PASS.get()` alone would do, since it also finds a pass that gradient checkpointing repeats.
            # `now.get()` takes less time.
            current = FORWARD_PASS.now.get() or FORWARD_PASS.get()
        names = kwargs.pop("adapter_names", None)
        if names is None and current is not None:
            names = current.names

        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters and names is not None:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self._disable_adapters or self.merged_adapters:
            return self._call_base([], args, kwargs)
        if not (is_traced or in_transform()):  # where tensors have no values
            self.check_grid(args)
        if names is not None:
            return run_named_rows(self, names, current, args, kwargs)
        return self._run(self.active_adapters, current, args, kwargs)

    def _run(
        self,
        adapters: Iterable[str],
        current: ForwardPass | None,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """Evaluate the layer with the same adapters for all rows, by its formula if there is one."""
        updates = self._updates(adapters, current)
        formula = self._find_formula(updates, args, kwargs) if updates else None
        if formula is not None:
            return compute_output(formula._replace(updates=tuple(updates)), *args)
        return self._call_base(updates, args, kwargs)

    def _find_formula(
        self,
        updates: Sequence[Update],
        args: tuple,
        kwargs: dict,
    ) -> LayerFormula | None:
        """Return the formula of the base layer, without the updates; None if it cannot evaluate this call."""
        base_layer = self._modules["base_layer"]
        stored = self.lotra_tensor.get_parameter(base_layer)
        reader = self._find_reader(stored)
        if reader is None or not reader.accepts(base_layer, stored, updates, args, kwargs):
            return None
        return reader.read(base_layer)

    def _updates(self, adapters: Iterable[str], current: ForwardPass | None) -> list[Update]:
        """Return the updates of the adapters that the layer has, as they were when the pass began."""
        names = self._available(adapters)
        updates = [self.update_of(name) for name in names]
        # An adapter that is exchanged during the pass keeps its former components until the pass ends. Those must be
        # looked up after the present ones were read: `hotswap_adapter` stores the former ones, and then exchanges.
        if current is not None and current.replaced:
            for index, name in enumerate(names):
                former = current.replaced.get((id(self), name), updates[index].tensor)
                updates[index] = updates[index]._replace(tensor=former)
        return updates

    def _call_base(self, updates: Sequence[Update], args: tuple, kwargs: dict) -> Any:
        """Run the base layer with the updates added to its parameters, one thread at a time."""
        base_layer = self._modules["base_layer"]
        with ExitStack() as stack:
            if not is_tracing():
                stack.enter_context(self._lock)
                if updates:
                    stack.enter_context(loaded(self))
            parameters = self._parameters_with(updates)
            return call_with_parameters(base_layer, parameters, base_layer, args, kwargs)

    def _find_reader(self, stored: Tensor, even_if_traced: bool = False) -> FormulaReader | None:
        """Return the reader of the formula in the present mode and dtype; None without a formula.

        A reader is kept with the state of the base layer in which it was verified, and looked for again if this has
        changed. While code is traced, the one that is kept counts. That of a `KANLinear` (`is_own`) always holds.
        """
        base_layer = self._modules["base_layer"]
        if type(base_layer) is not self._base_type:  # FSDP has wrapped it, or `call_with_parameters` is at work
            return None
        key = base_layer.training, stored.dtype
        verified_state, reader = self._readers.get(key, (None, None))
        if reader is not None and reader.is_own:
            return reader
        can_verify = even_if_traced or not (is_tracing() or in_transform())
        if not can_verify:
            return reader
        state = state_of(base_layer)
        if state != verified_state:
            reader = find_formula(base_layer, self.lotra_spec, self.lotra_tensor)
            self._readers[key] = state, reader
            # for the other mode too, since compiled code cannot look for it
            if reader is not None and reader.is_own:
                self._readers[not base_layer.training, stored.dtype] = state, reader
        return reader

    # --- merging ---

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """
        Merge the active adapters, or those named, into the parameters of the base layer.

        Args:
            safe_merge (`bool`, *optional*): Whether to check first that the merged weights are finite.
            adapter_names (`list[str]`, *optional*): The adapters to merge; defaults to all that are active.

        Raises:
            ValueError: A parameter is computed from others; or `safe_merge`, and the merged weights are not finite.
                The base weights are unchanged.
            RuntimeError: The grid has moved since the adapters were made.
        """
        unmerged = check_adapters_to_merge(self, adapter_names)
        names = self._available(dict.fromkeys(unmerged))
        if not names:
            return
        self.check_merge(names, safe_merge)
        with self._lock, torch.no_grad():
            if not self.merged_adapters:
                for name, parameter in self._base_parameters().items():
                    self.before_merge[name] = parameter.detach().clone()
            is_as_merged = not self.merged_adapters or self._checksum() == self._merged_checksum
            updates = [self.update_of(name) for name in names]
            self._merged_updates += updates
            self._write(self._parameters_with(updates))
            if is_as_merged:
                self._merged_checksum = self._checksum()
            self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Raise the errors of `merge`, which calls this."""
        if not adapter_names:  # nothing is merged, so that a grid that has moved does not matter
            return
        self.check_grid()
        base_layer = self.get_base_layer()
        for name in self._base_parameters():
            check_stored(self.lotra_name, base_layer, name)
        if not safe_merge:
            return
        updates = []
        for name in adapter_names:
            update = self.update_of(name)
            updates.append(update)
            values = [update.dense(), *self._parameters_with(updates).values()]
            if not all(value.isfinite().all() for value in values):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def unmerge(self) -> None:
        """
        Undo all merges. The parameters are restored bit for bit, from the copy that `merge` keeps.

        If they were trained, loaded or scaled since the merge, the updates are subtracted, and the change stays.

        Raises:
            RuntimeError: The grid was moved after the merge: the coefficients multiply other functions.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_grid()
        with self._lock, torch.no_grad():
            if self._checksum() == self._merged_checksum:
                self._write(self.before_merge)
            else:
                updates = [Update(-scale, tensor) for scale, tensor in self._merged_updates]
                self._write(self._parameters_with(updates))
            self.before_merge = {}
            self._merged_updates = []
            self.merged_adapters = []

    def _checksum(self) -> int:
        """Return the CRC-32 of the parameters that a merge changes, to tell whether others have changed them."""
        checksum = 0
        for parameter in self._base_parameters().values():
            values = getattr(parameter, "_local_tensor", parameter)  # of a shard
            if not values.is_meta:
                content = values.detach().flatten().cpu().view(torch.uint8)
                checksum = zlib.crc32(content.numpy().data, checksum)
        return checksum

    def _base_parameters(self) -> Tensors:
        """Return the parameters that a merge changes, by name."""
        return self.lotra_tensor.read_parameters(self.get_base_layer())

    @torch.no_grad()
    def _write(self, values: Tensors) -> None:
        base_layer = self.get_base_layer()
        for name, value in values.items():
            parameter = attrgetter(name)(base_layer)
            if 0 in parameter.stride():  # the rows of an expanded parameter share their memory
                parameter.data = value.to(parameter, copy=True)
            else:
                parameter.data.copy_(value)

    def base_target(self) -> Target:
        """Return the base layer as a target. While adapters are merged, its coefficients contain them."""
        return Target(self._modules["base_layer"], self.lotra_spec, self.lotra_tensor)

    def unload_and_optionally_merge_module(
        self,
        merge: bool,
        safe_merge: bool,
        adapter_names: list[str] | None,
    ) -> nn.Module:
        """Return the base layer, merged if asked, with the trained copies of the modules inside it."""
        if merge:
            self.merge(adapter_names=adapter_names)  # `safe_merge` was checked for all layers
        base_layer = self.get_base_layer()
        for parent, name, child in places(base_layer):
            if isinstance(child, ModulesToSaveWrapper):
                parent._modules[name] = child.unload_and_optionally_merge_module(False, False, None)
        return base_layer

    # --- the module ---

    def train(self, mode: bool = True) -> LoTRALayer:
        super().train(mode)
        if mode:
            freeze_norms(self)
        return self

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> LoTRALayer:
        grid = self.copy_grid()
        # a cast rounds the grid, but does not move it; on the meta device it has no values yet
        is_same = same_grid(self.lotra_grid, grid) and not holds_meta_tensors(grid)
        is_as_merged = self.merged and self._checksum() == self._merged_checksum
        super()._apply(fn, *args, **kwargs)
        self.before_merge = {name: fn(value) for name, value in self.before_merge.items()}
        if is_as_merged:
            self._merged_checksum = self._checksum()
        if is_same:
            self.lotra_grid = self.copy_grid()
        self._grid_state = []
        return self

    @property
    def weight(self) -> Tensor:
        # PEFT's property would return the weight of inkan's layers without the adapters
        return self.__getattr__("weight")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base layer: networks of other libraries read those of their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        base_layer = self._modules["base_layer"]
        if name in self.lotra_spec.grid_methods and not self.merged and self.lotra_r:
            getattr(base_layer, name)  # an AttributeError if the base layer lacks it
            return partial(refuse_grid_change, name)
        return read_attribute(self._with_effective_parameters, base_layer, name, self.lotra_tensor.parameters)

    def _with_effective_parameters(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function while the base layer has the applied updates."""
        with self._lock:
            return call_with_parameters(self.base_layer, self.effective_parameters(), function, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, of the base layer if it has one of this name: a parent may set `layer.grid`."""
        modules = self.__dict__.get("_modules", {})
        base_layer = modules.get("base_layer")
        # frameworks, such as accelerate and FSDP, set private names on each module
        is_private = name.startswith("_")
        is_own = is_private or name in modules or name in self.__dict__ or hasattr(type(self), name)
        if base_layer is None or is_own or not hasattr(base_layer, name):
            super().__setattr__(name, value)
            return
        if name in self.lotra_spec.grid and not self.merged and self.lotra_r:
            refuse_grid_change(name)
        setattr(base_layer, name, value)

    def __repr__(self) -> str:
        return "lotra." + super().__repr__()


def check_stored(name: str, layer: nn.Module, parameter: str) -> None:
    """Raise a ValueError if a parameter is computed from others.

    A parametrization or a pre-hook computes it. The views of FSDP are attributes too, without a pre-hook.
    """
    path, _, leaf = parameter.rpartition(".")
    owner = layer.get_submodule(path)
    is_hooked = leaf not in owner._parameters and owner._forward_pre_hooks
    if is_hooked or is_parametrized(owner, leaf):
        raise ValueError(
            f"`{parameter}` of `{name}` is computed from other parameters in each forward pass (pruning, "
            "weight_norm), so that an adapter would have no effect. Remove the reparametrization first."
        )


def further_names(model: nn.Module) -> dict[str, str]:
    """Return the second and later names of adapted layers that a model has in several places, with the first one."""
    first_names = {}
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoTRALayer):
            first = first_names.setdefault(module, name)
            if first != name:
                names[name] = first
    return names


def check_unmerged(model: nn.Module) -> None:
    """Raise a ValueError if adapters are merged into the model."""
    merged = [name for name, layer in lotra_layers(model) if layer.merged]
    if merged:
        raise ValueError(f"The adapters of {', '.join(merged[:3])} are merged: call `unmerge_adapter` first.")


def lotra_layers(
    model: nn.Module,
    adapter: str | None = None,
) -> Iterator[tuple[str, LoTRALayer]]:
    """Iterate over the adapted layers of a model with their names, or over those that have the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoTRALayer) and (adapter is None or adapter in module.lotra_r):
            yield name, module
