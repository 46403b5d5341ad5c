# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftMixedModel, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..files.checkpoint import own_tensors, refuse_for_model
from ..modules.calls import is_compiled, modules_of, set_mode
from ..modules.locks import LayerLock, exclusively_within, put_back_by
from .config import LoTRAConfig
from .first_backward import watch_first_backward
from .guards import base_layers_in_place, release_networks
from .hotswap import check_reload
from .initialization import GRADIENTS
from .injection import (
    cast_to_adapters,
    check_adapter_name,
    check_name_among_tensors,
    create_and_replace,
    mismatches,
    name_twice,
    prepare_config,
    prepare_targets,
    refuse_no_tensors,
    refuse_without_memory,
    replace_module,
    select_to_load,
    select_to_save,
)
from .layer import LoTRALayer, lotra_layers
from .mixed_batch import RowNames, batch_sizes
from .norm_stats import NormStatsTuner, with_adapter
from .saved_modules import put_saved_modules, saves_inside
from .slim import SLIM_MERGES, SlimLoTRALayer
from .targets import Target, check_parameters, record_base
from .transaction import change_lock, configs_among, creation, is_switched, whole
from .weighted import add_weighted_adapter, check_known


# what a state dict notes beside the version of the module
_MERGED = "lotra_merged_adapters"


class LoTRAModel(NormStatsTuner):
    """
    Creates a Low Tensor-Rank Adaptation (LoTRA) model from a model that contains Kolmogorov-Arnold (KAN) layers.

    The coefficients of each layer, a tensor (out, in, basis), are frozen, and an update in Tucker form is learned:
    `alpha * core x1 factor_out x2 factor_in x3 factor_basis`. The method is described in
    https://huggingface.co/papers/2502.06153.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`LoTRAConfig`]): The configuration of the LoTRA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The LoTRA model.

    Raises:
        ValueError: The model has no KAN layer, is itself one, or a target is none. The model is unchanged.

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
    # Hooks, which the package sets, since it imports the hub after this module: `write_card(model, folder)` is called
    # after each `save_pretrained`, and `push(model, repo_id, ...)` by `push_to_hub`. None: as PEFT does.
    write_card: Callable[..., None] | None = None
    push: Callable[..., Any] | None = None

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        # before super().__init__, which injects the first adapter
        # what the parameters of the base required before any adapter, and require again when all are unloaded
        self._requires_grad_of_base: list[tuple[nn.Parameter, bool]] | None = None
        self.lotra_lock = LayerLock()
        # the targets of the adapter that is being injected, whether modules inside of them are saved, and what to exit
        self._targets: dict[str, Target] = {}
        self._saves_inside = False
        self._injection: ExitStack | None = None
        with change_lock(self).held, creation(model, configs_among(args, kwargs)):
            super().__init__(model, *args, **kwargs)

    @whole
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        with ExitStack() as locks:
            # other threads may go on with inference
            for lock in (self.lotra_lock, *(layer.lotra_lock for _, layer in lotra_layers(model))):
                locks.enter_context(lock)
            self._inject_adapter(model, adapter_name, *args, **kwargs)

    def _inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        check_adapter_name(adapter_name)
        peft_config = self.peft_config[adapter_name]
        check_name_among_tensors(adapter_name, model, bool(getattr(peft_config, "modules_to_save", None)))
        requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with peft_config.handed_over(self.peft_config, adapter_name), ExitStack() as self._injection:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._injection = None
        by_name = dict(lotra_layers(model, adapter_name))
        layers = list(by_name.values())
        # PEFT 0.19 looks only whether any adapter has a layer
        if not (layers or peft_config.modules_to_save or peft_config.target_modules == DUMMY_TARGET_MODULES):
            raise ValueError(f"Target modules {peft_config.target_modules} not found in the base model.")
        self._targets = {}
        watch_first_backward({name: layer.lotra_core[adapter_name] for name, layer in by_name.items()})
        for layer in layers:
            GRADIENTS.pop(layer.get_base_layer(), None)
        if self._requires_grad_of_base is None:
            self._requires_grad_of_base = requires_grad
        peft_config.record_base_by(self._record_base)

    def _record_base(self, base_layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return record_base(self.model, base_layers)

    def train(self, mode: bool = True) -> LoTRAModel:
        """Sets the mode of all modules, also of networks whose own `train` is a training loop."""
        if not isinstance(mode, bool):
            raise ValueError(f"The mode is {mode!r}: expected `True` for training, `False` for evaluation.")
        self.training = mode
        for child in self.children():
            set_mode(child, mode)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copied, or an unpickled model
        super().__setstate__(state)
        for config in self.peft_config.values():
            config.record_base_by(self._record_base)

    def _prepare_adapter_config(self, peft_config: LoTRAConfig, model_config: dict) -> LoTRAConfig:
        return prepare_config(peft_config)

    def _prepare_model(self, peft_config: LoTRAConfig, model: nn.Module) -> None:
        self._targets = prepare_targets(peft_config, model)
        self._saves_inside = saves_inside(peft_config, self._targets)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        if self._saves_inside and self._injection is not None:  # next, PEFT copies the modules to save
            self._injection.enter_context(base_layers_in_place(model))

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
    ) -> None:
        create_and_replace(self, self._targets, peft_config, adapter_name, target, current_key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        replace_module(self.model, child, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT puts new parameters into the place of those in half precision, which require a gradient
        layers = [layer for _, layer in lotra_layers(self.model, adapter_name)]
        flags = [[part.requires_grad for part in layer.get_components(adapter_name)] for layer in layers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, before in zip(layers, flags, strict=True):
            for part, flag in zip(layer.get_components(adapter_name), before, strict=True):
                part.requires_grad_(flag)

    def _merged(self) -> list[str]:
        return sorted({name for _, layer in lotra_layers(self.model) for name in layer.merged_adapters})

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)  # which `torch.save` and `copy.deepcopy` keep
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[_MERGED] = self._merged()

    def _check_merged(self, of_state: list[str] | None) -> None:
        """Refuses the state of another merge, whose updates would count twice, or not at all."""
        if of_state is not None and of_state != self._merged():
            raise ValueError(
                f"The state dict is that of a model with the adapters {of_state} merged, and this one has "
                f"{self._merged()} merged, so that updates would count twice, or not at all. Call `merge_adapter` or "
                "`unmerge_adapter` before, so that both agree."
            )

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuses tensors that do not fit before the first of them is loaded. Called by `load_state_dict`."""
        self._check_merged(args[0].get(_MERGED))
        refuse_for_model(mismatches(self.model, state_dict, f"{prefix}model."))
        if not args[0].get("assign_to_params_buffers", False):
            refuse_without_memory(self.model, state_dict, f"{prefix}model.")
        name_twice(self.model, state_dict, f"{prefix}model.")
        cast_to_adapters(self.model, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # From PEFT 0.20 on. For tensors that come without a config, for an adapter that is there.
        refuse_no_tensors(state_dict)
        # first without what files of PEFT 0.19 have of other adapters, which may be called like this one
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, own_tensors(state_dict))
        state_dict = with_adapter(state_dict, adapter_name)
        return select_to_load(model, adapter_name, state_dict)

    def check_reload(self, adapter_name: str, path: str | os.PathLike, **kwargs: Any) -> None:
        """Raises a ValueError if an adapter that is there cannot take the tensors of a file."""
        kwargs.setdefault("check_base", self.peft_config[adapter_name].check_base)
        check_reload(self.model, self.peft_config[adapter_name], adapter_name, path, **kwargs)

    def check_saving(
        self, selected_adapters: list[str] | None = None, save_embedding_layers: bool | str = "auto"
    ) -> None:
        """Raises a ValueError if an adapter, once saved, could not be loaded. Called before anything is written."""
        for adapter in self.peft_config if selected_adapters is None else selected_adapters:
            if adapter in self.peft_config:  # PEFT refuses unknown ones
                self.peft_config[adapter].check_loadable()
        if save_embedding_layers is True:
            warnings.warn(
                "`save_embedding_layers=True` saves nothing: loading would write over the embeddings of the base. To "
                "train and save a copy of an embedding, name it in `modules_to_save`.",
                stacklevel=3,
            )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        return select_to_save(adapter_name, state_dict)

    @partial(whole, changes=is_switched, merges=True)
    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        keep_base: bool = True,
        slim: Literal["densify", "truncate"] = "densify",
    ) -> None:
        """Merges the active adapters, or those named, into the base model; `unmerge_adapter` undoes it.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters.
            safe_merge (`bool`): Whether to check first that the merged weights are finite.
            keep_base (`bool`):
                Whether the adapted parameters are kept as they were, so that unmerging restores them bit for bit. It
                takes their memory once more. Otherwise the update is subtracted, and each cycle of merging and
                unmerging leaves rounding errors behind. Slim layers are always kept, which takes little.
            slim (`str`): What becomes of Slim layers, see `merge_and_unload`.
        """
        self._check_merge(adapter_names, safe_merge)
        for layer in self._set_slim_merge(slim).values():
            layer.keep_base = keep_base
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    unmerge_adapter = whole(NormStatsTuner.unmerge_adapter, is_switched)
    unload = whole(NormStatsTuner.unload)
    _enable_adapter_layers = whole(NormStatsTuner._enable_adapter_layers, is_switched)

    @partial(whole, merges=True)
    def merge_and_unload(self, *args, slim: Literal["densify", "truncate"] = "densify", **kwargs) -> nn.Module:
        """Merges the active adapters, or those named, into the base model, and returns it without a trace of LoTRA.

        Args:
            args, kwargs: As PEFT's (`progressbar`, `safe_merge`, `adapter_names`).
            slim (`"densify"` or `"truncate"`):
                What becomes of Slim layers, whose ranks an adapter adds to: a dense layer, exactly; or a Slim layer of
                the ranks that it had, by HOOI. The errors of that are in the attribute `merge_errors` of the model
                that is returned, by layer, as shares of the norm of the merged coefficient tensors.
        """
        layers = self._set_slim_merge(slim)
        model = super().merge_and_unload(*args, **kwargs)
        slim_layers = {name: layer for name, layer in layers.items() if isinstance(layer, SlimLoTRALayer)}
        errors = {name: layer.merge_error for name, layer in slim_layers.items() if layer.merge_error is not None}
        if errors:
            model.merge_errors = errors  # pyright: ignore[reportArgumentType]  (a module takes any attribute)
        return model

    def _set_slim_merge(self, slim: str) -> dict[str, LoTRALayer]:
        """Says what becomes of Slim layers. Returns all adapted layers, by name."""
        if slim not in SLIM_MERGES:
            raise ValueError(f"`slim` is {slim!r}, but must be one of {SLIM_MERGES}.")
        layers = dict(lotra_layers(self.model))
        for layer in layers.values():
            if isinstance(layer, SlimLoTRALayer):
                layer.slim_merge = slim
        return layers

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if isinstance(self.model, (PeftModel, PeftMixedModel)):  # whose configs PEFT fails to take away
            raise ValueError(
                "The base of this model is itself a PeftModel, and both have their adapters in the same layers. Merge "
                "or unload the inner one, `model.get_base_model().merge_and_unload()`. `add_adapter` instead of a "
                "second `get_peft_model` keeps all adapters in one model."
            )
        layers = [layer for _, layer in lotra_layers(self.model)]
        if merge:
            self._check_merge(adapter_names, safe_merge)
        else:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        put_saved_modules(self.model)
        release_networks(self.model)
        # pykan's `fit`, for one, expects its own parameters to be trainable
        for parameter, flag in self._requires_grad_of_base or ():
            parameter.requires_grad = flag
        for layer in layers:
            if isinstance(layer, SlimLoTRALayer):
                layer.take_over_flags()
        return self.model

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raises what a merge would raise, before the first layer is merged."""
        if adapter_names is not None:
            check_known(adapter_names, self.peft_config)
        # what was pruned, or shared, after it had been adapted
        check_parameters(any(config.adapt_residual for config in self.peft_config.values()), self.model, {})
        if safe_merge:
            for _, layer in lotra_layers(self.model):
                layer.check_safe_merge(adapter_names)

    @partial(whole, changes=is_switched)
    def set_adapter(self, adapter_name: str | list[str], *args, **kwargs) -> None:
        check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name, self.peft_config)
        super().set_adapter(adapter_name, *args, **kwargs)

    @whole
    def delete_adapter(self, adapter_name: str) -> None:
        # newer versions of PEFT check this themselves
        if any(adapter_name in layer.merged_adapters for _, layer in lotra_layers(self.model)):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            warnings.warn(
                f"{adapter_name!r} was the last adapter. PEFT asks for the config of the active adapter in each "
                "forward pass, which raises a KeyError until another one is added and set active. `unload()` returns "
                "the base.",
                stacklevel=3,
            )

    add_weighted_adapter = whole(add_weighted_adapter)

    @exclusively_within
    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not torch.compiler.is_compiling() and any(map(is_compiled, modules_of(self.model))):
            raise ValueError(
                "Cannot pass `adapter_names` when a part of the model is compiled, which would not notice them: "
                "compile the whole model, `torch.compile(model)`."
            )
        adapter_names = RowNames.of(kwargs["adapter_names"])
        # A layer need not have each of the adapters, but a name that no layer has is a typo.
        layers = [layer for _, layer in lotra_layers(self.model)]
        unexpected_adapters = [
            name
            for name in adapter_names.distinct
            if name != "__base__" and not any(name in layer.lotra_core for layer in layers)
        ]
        if unexpected_adapters:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected_adapters))}")

        sizes = batch_sizes([args, {name: value for name, value in kwargs.items() if name != "adapter_names"}])
        if sizes and len(adapter_names) not in sizes:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {sizes[0]} respectively."
            )

        def pass_names(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            names = adapter_names.for_rows(len(x))
            if isinstance(module, AuxiliaryTrainingWrapper):  # rows of adapters without a copy get the base's module
                names = [name if name in module._get_available_adapters() else "__base__" for name in names]
            return args, {**kwargs, "adapter_names": names}

        takers = [module for module in modules_of(self) if isinstance(module, (LoTRALayer, AuxiliaryTrainingWrapper))]

        def remove_hooks():
            for module in takers:
                for key in [key for key, hook in module._forward_pre_hooks.items() if hook is pass_names]:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

        with self._norm_stats_for(adapter_names.distinct), put_back_by(remove_hooks):
            for module in takers:
                module.register_forward_pre_hook(pass_names, with_kwargs=True)
            yield
