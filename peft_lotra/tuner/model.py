# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from ..hub.card import remove_new_card
from ..modules.calls import (
    PREFIX,
    LayerLock,
    check_loaded,
    freeze_norms,
    is_compiled,
    is_tracing,
    places,
    read_at_rest,
    set_mode,
    undone_on_error,
    unwrap,
)
from ..tucker import COMPONENTS
from .base_record import check_base, record_layer
from .by_row import FORWARD_PASS, ForwardPass, Replaced, check_batch, check_names, find_row_counts, pass_names
from .config import LoTRAConfig, pattern_key
from .guards import base_layers_in_place, guard_network, release_networks
from .layer import LoTRALayer, Targets, Tensors, further_names, lotra_layers
from .linear_path import PATH, linear_paths
from .saving import (
    cast_to_storage,
    check_complete,
    check_no_base,
    check_shapes,
    check_state_dict,
    check_tensors,
    find_reload,
    find_save,
    read_tensors,
    saved_tensors,
)
from .targets import (
    bare_name,
    check_targets,
    exact_targets,
    find_targets,
    locate_target,
    warn_of_choices,
)
from .weighted import add_weighted_adapter, check_known


Locations = dict[nn.Module, list[tuple[nn.Module, str]]]  # the places of a module: its parents, and its names in them


class LoTRAModel(BaseTuner):
    """
    Adapts a model with KAN layers by LoTRA; `get_peft_model(model, LoTRAConfig())` creates it.

    The coefficients of each layer, a tensor (out, in, basis), are frozen, and an update in Tucker form is learned:
    `alpha * core x1 factor_out x2 factor_in x3 factor_basis`. The method is described in
    https://huggingface.co/papers/2502.06153.

    The base is frozen. Norms with running statistics therefore stay in evaluation mode, unless `modules_to_save`
    names them.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`LoTRAConfig`]): The configuration of the LoTRA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The LoTRA model.

    Raises:
        ValueError: The model contains no KAN layer, is a KAN layer, or a target is no KAN layer. The model is
            unchanged.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 16, 16, 1]), LoTRAConfig(r=4))
        >>> trainable, total = model.get_nb_trainable_parameters()

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`LoTRAConfig`]) -- The configuration of the LoTRA model.
    """

    prefix: str = "lotra_"
    tuner_layer_cls = LoTRALayer
    target_module_mapping: dict[str, Any] = {}
    peft_config: dict[str, LoTRAConfig]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # before super().__init__, which injects the first adapter
        self._targets: Targets = {}  # of the adapter that is injected
        self._locations: Locations = {}  # while layers are replaced
        self._injection = ExitStack()
        self._requires_grad_of_base = []
        self.replaced: Replaced = {}  # see `hotswap_adapter`
        self.swap_lock = LayerLock()  # held while components are exchanged or read for a file
        super().__init__(model, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        config = self.peft_config[adapter_name]
        _check_adapter_name(adapter_name, config, model)
        adds_path = any(linear_paths(model)) and not config.is_from_file
        if config.budget is not None or adds_path:
            # the ranks and the path are written into it, and the object may serve other models
            self.peft_config[adapter_name] = config = copy(config)
        if adds_path:
            config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or ()), PATH])]
        requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with undone_on_error(model), self._injection:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._requires_grad_of_base = self._requires_grad_of_base or requires_grad
        if config.modules_to_save:
            for module in model.modules():
                is_wrapper = isinstance(module, AuxiliaryTrainingWrapper)
                if is_wrapper and pass_names not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(pass_names, with_kwargs=True)
        self._targets = {}
        self._locations = {}
        freeze_norms(model)

    def _prepare_adapter_config(self, peft_config: LoTRAConfig, model_config: dict) -> LoTRAConfig:
        return peft_config

    def _prepare_model(self, peft_config: LoTRAConfig, model: nn.Module) -> None:
        """Find and check all that an adapter needs, before the first module is replaced."""
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        with read_at_rest(model):
            targets = find_targets(peft_config, model)
            self._targets = targets
            peft_config.spend_budget(targets)
            check_targets(peft_config, model, targets)
        if not peft_config.is_from_file and peft_config.source is None:
            warn_of_choices(peft_config, targets)
        read_checked(peft_config, model, targets)  # PEFT reads the tensors again, to load them
        if peft_config.source is not None and peft_config.companions:
            warnings.warn(
                f"The adapter was saved with adapters of other methods, {peft_config.companions}, which are not "
                "loaded. `peft_lotra.load_adapters` loads all of them.",
                stacklevel=2,
            )
        if peft_config.is_from_file or peft_config.targets_all_kan:
            peft_config.target_modules = exact_targets(targets, model)
        peft_config.source = None  # has been read; the object may serve another model
        self._locations = _find_locations(model)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
    ) -> None:
        # if PEFT injects from a state dict, its names differ from those of the configuration
        _, spec, tensor = self._targets.get(current_key) or locate_target(current_key, target)
        if not isinstance(target, LoTRALayer):
            adapted = LoTRALayer(target, spec, tensor, current_key)
            self._replace_module(parent, target_name, adapted, target)
            target = adapted
            if spec.network_methods or spec.checkpoint_methods:
                guard_network(self.model, current_key, spec)
        elif not target.lotra_r:
            target.remember_grid()  # it may have moved while there was no adapter
        target.update_layer(adapter_name, peft_config)

    def _replace_module(
        self,
        parent: Any,
        child_name: str,
        new_module: nn.Module,
        child: nn.Module,
    ) -> None:
        # a shared layer has several parents, and PEFT passes one
        for module, name in self._locations[child]:
            setattr(module, name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        if any(config.modules_to_save for config in self.peft_config.values()):
            # next, PEFT copies these modules, but refuses those inside of tuner layers
            self._injection.enter_context(base_layers_in_place(model))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # in place: PEFT would create parameters that require gradients
        if not autocast_adapter_dtype:
            return
        endings = _endings(adapter_name)
        for name, parameter in self.model.named_parameters():
            if name.endswith(endings) and parameter.itemsize < 4:
                parameter.data = parameter.data.float()

    # --- saving and loading ---

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self.swap_lock:
            return super().state_dict(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: Tensors,
        unwanted_adapter_names: Any,
    ) -> Tensors:
        # PEFT does not find the names of layers that FSDP has wrapped
        endings = _endings(adapter_name)
        tensors = {key: tensor for key, tensor in state_dict.items() if key.endswith(endings)}
        prefix = ""
        base = model
        if hasattr(model, "get_base_model"):
            prefix = PREFIX
            base = model.get_base_model()
        save = find_save()
        if save is not None:
            try:
                if not save.get("safe_serialization", True):
                    raise ValueError("LoTRA adapters are saved as safetensors only: leave `safe_serialization` out.")
                check_complete(adapter_name, tensors, state_dict)
                if config.storage is not None:
                    tensors = cast_to_storage(tensors, config.storage)
                _record_save(config, base, adapter_name, save.get("selected_adapters") or ())
            except ValueError:
                remove_new_card(save["save_directory"])
                raise
        # PEFT would go on to add the embeddings of the base if they were resized
        for key in state_dict.keys() - tensors.keys():
            if ".modules_to_save." not in key:
                del state_dict[key]
        repeated = tuple(f"{prefix}{name}.lotra_" for name in further_names(base))
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(repeated)}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)
        save = find_save() or {}
        for name in save.get("selected_adapters") or ():
            method: Any = self.peft_config[name].peft_type
            if method != "LOTRA" and any(lotra_layers(self.model, name)):
                remove_new_card(save["save_directory"])
                raise ValueError(
                    f"{name!r} is also the name of an adapter of {method.value}, whose configuration has replaced "
                    "LoTRA's: LoTRA would be lost. Inject the other adapter under another name."
                )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: Tensors,
    ) -> Tensors:
        # PEFT reads the file again, and passes state dicts of users too
        check_state_dict(state_dict)
        reload = find_reload()
        if reload is not None:
            _check_reload(unwrap(model), adapter_name, reload["model_id"], reload.get("hf_hub_download_kwargs", {}))
        prefix = PREFIX if hasattr(model, "get_base_model") else ""
        tensors = {}
        for key, tensor in _rename_layers(state_dict, config.names_in_model).items():
            if key.endswith(COMPONENTS):
                key = f"{key}.{adapter_name}"
            tensors[prefix + key.removeprefix(PREFIX)] = tensor
        check_no_base(model, tensors)
        for name, first in further_names(model).items():  # a layer with several names is loaded under each
            for component in COMPONENTS:
                key = f"{first}.{component}.{adapter_name}"
                if key in tensors:
                    tensors.setdefault(f"{name}.{component}.{adapter_name}", tensors[key])
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT also adds the copies of resized embeddings
        key = key.replace(f".modules_to_save.{adapter_name}.", ".")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _load_from_state_dict(
        self,
        state_dict: Tensors,
        prefix: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # torch would raise too, but after it has copied the tensors that fit
        check_shapes(dict(self.named_parameters(prefix.removesuffix("."))), state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # --- the forward pass ---

    def train(self, mode: bool = True) -> LoTRAModel:
        """Set the mode of all modules except frozen norms, also in networks whose own `train` is a training loop."""
        self.training = mode
        for child in self.children():
            set_mode(child, mode)
        if mode:
            freeze_norms(self.model)
        return self

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            names = self._check_adapter_names(names, args, kwargs)
        if is_tracing():
            yield
            return

        def count_rows() -> set[int]:
            layers = [layer for _, layer in lotra_layers(self.model)]
            return find_row_counts(self.model, layers, len(names or ()), args, kwargs)

        with ExitStack() as stack:
            current = ForwardPass(names, self.replaced, set(), count_rows)
            # like `FORWARD_PASS.set`, without its calls
            stack.callback(FORWARD_PASS.now.reset, FORWARD_PASS.now.set(current))
            if names is not None and torch.is_grad_enabled():
                # for layers that gradient checkpointing runs again, see `PassVariable`
                handle = self.model.register_forward_hook(lambda *call: FORWARD_PASS.keep(call[-1]))
                stack.callback(handle.remove)
            yield

    def _check_adapter_names(
        self,
        names: Any,
        args: tuple,
        kwargs: dict,
    ) -> tuple[str, ...]:
        """Return the adapter of each sample; raise a ValueError if the inputs or the model do not take them."""
        names = check_names(names)
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(names) - self.peft_config.keys() - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        check_batch(len(names), args, kwargs)
        if is_tracing() or any(is_compiled(module) for module in self.modules()):
            raise ValueError("`adapter_names` do not reach compiled modules: call the model that is not compiled.")
        return names

    # --- merging ---

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
    ) -> None:
        """Merge the active adapters, or those named, into the base model; `unmerge_adapter` undoes it bit for bit.

        If the merged parameters were changed in between, `unmerge_adapter` subtracts the updates.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters.
            safe_merge (`bool`): Whether to check first that the merged weights are finite.
        """
        self._check_detached()
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Check all layers before the first one is merged."""
        check_known(adapter_names or (), self.peft_config)
        check_loaded(self.model, "model")
        for _, layer in lotra_layers(self.model):
            names = adapter_names or layer.active_adapters
            unmerged = [name for name in names if name in layer.lotra_r and name not in layer.merged_adapters]
            layer.check_merge(unmerged, safe_merge)

    def _check_detached(self) -> None:
        """Raise a ValueError while an `AdapterBank` serves the model: it adds its updates to unmerged layers."""
        if any("lotra_bank" in vars(layer) for _, layer in lotra_layers(self.model)):
            raise ValueError("The model serves an AdapterBank: call `bank.detach()` before a merge or `unload`.")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_detached()
        if merge:
            self._check_merge(adapter_names, safe_merge)
        elif any(layer.merged for _, layer in lotra_layers(self.model)):
            self.unmerge_adapter()
        for parameter, requires_grad in self._requires_grad_of_base:
            parameter.requires_grad_(requires_grad)
        if not merge:
            for network in linear_paths(self.model):
                network.linear_path = network.path_of("__base__")  # PEFT would leave the one of the adapter
        # found before the first layer is replaced: PEFT's attention cannot list its modules halfway
        self._locations = _find_locations(self.model)
        try:
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        finally:
            self._locations = {}
        release_networks(model)
        for module in model.modules():
            # `freeze_norms` has put it into evaluation mode
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.training = model.training
        return model

    add_weighted_adapter = add_weighted_adapter


def _endings(adapter_name: str) -> tuple[str, ...]:
    """Return how the names of the components of an adapter end in a model."""
    return tuple(f".{component}.{adapter_name}" for component in COMPONENTS)


def _find_locations(model: nn.Module) -> Locations:
    """Return the parents of each module, with its names in them."""
    locations: Locations = {}
    for parent, name, child in places(model):
        locations.setdefault(child, []).append((parent, name))
    return locations


def _record_save(
    config: LoTRAConfig,
    base: nn.Module,
    adapter_name: str,
    saved: Iterable[str],
) -> None:
    """Let the configuration, which PEFT writes after the tensors, record the base and the adapters of this save.

    Raises:
        ValueError: The base has no layers with this adapter.
    """
    layers = {bare_name(name): layer for name, layer in lotra_layers(base, adapter_name)}
    if not layers and config.target_modules != DUMMY_TARGET_MODULES:
        raise ValueError(
            "The model has no LoTRA layers, so that nothing was saved: they were merged or unloaded. Save before "
            "`merge_and_unload`, or save the model that it returns."
        )
    configs = getattr(base, "peft_config", {})
    config.saved_with = [adapter_name]
    for name in saved:
        if name in configs and configs[name].peft_type != "LOTRA":
            config.saved_with.append(name)

    # both are replaced, since the object may serve other models too
    config.layers_to_record = {name: record_layer(layer) for name, layer in layers.items()}
    config.ranks_to_record = {}
    for name, layer in layers.items():
        shapes = config.shapes_of(name, layer.lotra_tensor)
        if config.r is None or shapes["core"] != layer.lotra_r[adapter_name]:
            config.ranks_to_record[name] = layer.get_components(adapter_name).form


def _check_adapter_name(name: Any, config: LoTRAConfig, model: nn.Module) -> None:
    """Raise a ValueError for a name that no parameter or folder can have, or that stands for the base or a module."""
    is_usable = isinstance(name, str) and name not in ("", "__base__")
    is_usable = is_usable and not any(mark in name for mark in "./\\")
    # PEFT removes the names of adapters from those of saved tensors
    saved = [f"{PREFIX}{module}.{key}" for module, key, _ in saved_tensors(config, model, ())]
    words = ".".join(saved).split(".")
    if not is_usable or hasattr(nn.ParameterDict(), name) or name in words:
        raise ValueError(
            f"An adapter cannot be called {name!r:.100}: take a string without dots and slashes that torch does "
            "not use, and that is no part of the names of saved tensors."
        )


def read_checked(
    config: LoTRAConfig,
    model: nn.Module,
    targets: Targets,
    is_strict: bool = False,
) -> Tensors:
    """Compare an adapter from a file, its base and its tensors, with a model.

    The layers of the file are paired with those of the model. The patterns in `config` are renamed accordingly, since
    the shapes of the components depend on them. With `is_strict`, tensors that the configuration was not saved with
    are refused.

    Returns:
        The tensors by their names in the model; none without a file.
    """
    if config.base_layers:
        config.names_in_model = dict(zip(config.base_layers, targets, strict=True))
        for old, new in config.names_in_model.items():
            if old != new:
                _rename_pattern(config.rank_pattern, old, new)
                _rename_pattern(config.alpha_pattern, old, new)
        check_base(config, targets, model)
    if config.source is None:
        return {}
    tensors = read_tensors(config.source, config.weights_sha256, is_strict)
    tensors = _rename_layers(tensors, config.names_in_model)
    check_tensors(tensors, config, model, targets)
    return tensors


def _check_reload(
    model: nn.Module,
    adapter_name: str,
    folder: str | os.PathLike,
    hub_kwargs: dict[str, Any],
) -> None:
    """Compare the configuration of a file with the adapter whose tensors it replaces.

    Raises:
        ValueError: The file is none of LoTRA, or has other layers, another scale, or another grid.
    """
    config = LoTRAConfig.from_pretrained(folder, **hub_kwargs)
    if config.base_layers is None:
        return
    targets = find_targets(config, model)
    alphas = dict(zip(targets, map(config.alpha_of, config.base_layers), strict=True))
    present = {name: layer.lotra_alpha[adapter_name] for name, layer in lotra_layers(model, adapter_name)}
    if alphas != present:
        raise ValueError(
            f"The adapter at {folder} has the alphas {alphas}, and `load_adapter` would keep those of "
            f"{adapter_name!r}, {present}. Load it under another name, or by `hotswap_adapter`."
        )
    check_base(config, targets, model)


def _rename_pattern(pattern: dict[str, Any], old: str, new: str) -> None:
    """Let the entry of `rank_pattern` or `alpha_pattern` for a layer hold for its new name."""
    key = get_pattern_key(list(pattern), old)
    if key in pattern:
        pattern[pattern_key(new)] = pattern[key]
        if key == pattern_key(old):
            del pattern[key]


def _rename_layers(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Return the tensors of a file with the names of its layers in this model."""
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, component = key.removeprefix(PREFIX).rpartition(".")
        if layer not in names:
            layer = bare_name(layer)
        if layer in names:
            key = f"{PREFIX}{names[layer]}.{component}"
        renamed[key] = tensor
    return renamed
