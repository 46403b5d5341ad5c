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

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..families.slim import SlimLayer
from ..files.fingerprint import hash_all_dtypes
from ..kan.slim_kan import SlimKANLinear
from .config import ALL_KAN, LoTRAConfig, WeakMethod
from .gradients import drop_gradients
from .guards import guard_network, release_networks
from .layer import LoTRALayer, lotra_layers
from .locks import LayerLock, exclusively_within
from .mixed_batch import RowNames
from .slim import SLIM_MERGES, SlimLoTRALayer
from .targets import check_base, describe_targets, find_targets, locate_target, read_values, resolve_target_modules
from .weighted import add_weighted_adapter


class LoTRAModel(BaseTuner):
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

    ```py
    >>> from peft import get_peft_model
    >>> from peft_lotra import LoTRAConfig
    >>> from peft_lotra.kan import KAN

    >>> kan = KAN([2, 16, 16, 1])
    >>> model = get_peft_model(kan, LoTRAConfig(r=4))
    >>> model.print_trainable_parameters()
    ```

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`LoTRAConfig`]): The configuration of the LoTRA model.
    """

    prefix: str = "lotra_"
    tuner_layer_cls = LoTRALayer
    target_module_mapping: dict[str, Any] = {}

    def __init__(self, *args, **kwargs) -> None:
        # Set before super().__init__, which injects the first adapter:
        # what the base model's parameters were before any adapter, and what they are again when all are unloaded
        self._requires_grad_of_base: list[tuple[nn.Parameter, bool]] | None = None
        self.lotra_lock = LayerLock()
        # adapters that were injected to be loaded from a checkpoint, with what their injection changed
        self._awaited_adapters: dict[str, list[tuple[nn.Parameter, bool]]] = {}
        super().__init__(*args, **kwargs)

    #############
    # Injection #
    #############

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        # other threads may go on with inference
        with ExitStack() as locks:
            for lock in (self.lotra_lock, *(layer.lotra_lock for _, layer in lotra_layers(model))):
                locks.enter_context(lock)
            self._inject_adapter(model, adapter_name, *args, **kwargs)

    def _inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        if "." in adapter_name:  # what nn.ParameterDict would say, but only when some layers are adapted already
            raise KeyError(f'The adapter name can\'t contain ".", got {adapter_name!r}.')
        peft_config = self.peft_config[adapter_name]
        requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = [layer for _, layer in lotra_layers(model, adapter_name)]
            # PEFT 0.19 looks only whether any adapter has a layer
            if not (layers or peft_config.modules_to_save or peft_config.target_modules == DUMMY_TARGET_MODULES):
                raise ValueError(f"Target modules {peft_config.target_modules} not found in the base model.")
        except Exception:
            self._take_out(adapter_name, requires_grad)
            raise
        drop_gradients([layer.get_base_layer() for layer in layers])
        if self._requires_grad_of_base is None:
            self._requires_grad_of_base = requires_grad
        peft_config.describe_base = WeakMethod(self._describe_base)
        if peft_config.checkpoint_layers is not None or peft_config.checkpoint_tensors is not None:
            self._awaited_adapters[adapter_name] = requires_grad

    def _describe_base(self, base_layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The record of the base for a file: that of the configuration, with hashes of what can be read now."""
        modules = dict(self.model.named_modules())
        description = {}
        for name, layer in base_layers.items():
            values = read_values(name, modules[name]) if name in modules else {}  # FSDP gives other names
            description[name] = {**layer, **{what: hash_all_dtypes(value) for what, value in values.items()}}
        return description

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copied, or an unpickled model
        super().__setstate__(state)
        for config in self.peft_config.values():
            config.describe_base = WeakMethod(self._describe_base)

    def _take_out(self, adapter_name: str, requires_grad: list[tuple[nn.Parameter, bool]]) -> None:
        """Undoes the injection of an adapter, as if it had never been tried."""
        for module in list(self.model.modules()):
            if isinstance(module, LoTRALayer) and adapter_name in module.lotra_core:
                adapters, bare = module.lotra_core, module.base_layer
            elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                adapters, bare = module.modules_to_save, module.original_module
            else:
                continue
            if len(adapters) == 1:
                self._replace_module(None, None, bare, module)
            elif isinstance(module, LoTRALayer):
                module.delete_adapter(adapter_name)
            else:
                module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])
        release_networks(self.model)
        for parameter, flag in requires_grad:
            parameter.requires_grad = flag

    def _prepare_adapter_config(self, peft_config: LoTRAConfig, model_config: dict) -> LoTRAConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = ALL_KAN
        return peft_config

    def _prepare_model(self, peft_config: LoTRAConfig, model: nn.Module) -> None:
        """Finds and checks all targets before the first of them is touched."""
        if peft_config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(
            model, "prepare_inputs_for_generation"
        ):
            raise ValueError(
                f"`task_type` is {peft_config.task_type!r}, but the model does not generate: it has no "
                "`prepare_inputs_for_generation`. Leave `task_type` out."
            )
        peft_config.target_modules = resolve_target_modules(peft_config, model)
        targets = find_targets(peft_config, model)
        peft_config.base_layers = describe_targets(targets)
        if peft_config.checkpoint_layers is not None:
            check_base(peft_config, targets)
        if peft_config.checkpoint_tensors is not None:
            LoTRAModel._check_tensor_names(peft_config, model, targets)

    @staticmethod
    def _check_tensor_names(peft_config: LoTRAConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        """Compares the names in a file of tensors with those that the adapter has in this model. PEFT would pass over
        what it misses, and write what is superfluous wherever the name leads, into the base too."""
        if getattr(model, "_checkpoint_conversion_mapping", None):  # the names in the file are older ones
            return
        modules = dict(model.named_modules())
        expected, aliases = set(), set()
        for name, module in model.named_modules(remove_duplicate=False):  # a shared layer has several names
            keys = []
            if any(module is target for target in targets.values()):
                keys = LoTRALayer.adapter_layer_names
            elif any(name.endswith(ending) for ending in peft_config.modules_to_save or ()):  # PEFT's own rule
                keys = list(getattr(module, "original_module", module).state_dict())
            (expected if name in modules else aliases).update(f"{name}.{key}" for key in keys)
        found = {name.removeprefix("base_model.model.") for name in peft_config.checkpoint_tensors}
        allowed = expected | aliases | _embeddings(model)
        wrong = [f"{name} is missing" for name in sorted(expected - found)]
        # PEFT 0.19 saves the components of all adapters, those of the others with their names; they are passed over
        found = {name for name in found if not name.rpartition(".")[0].endswith(LoTRALayer.adapter_layer_names)}
        wrong += [f"{name} is nothing that this adapter has" for name in sorted(found - allowed)]
        if wrong:
            raise ValueError(
                "The adapter does not fit the model, nothing was loaded:\n  "
                + "\n  ".join(wrong[:20])
                + ("\n  ..." if len(wrong) > 20 else "")
                + "\nLoad it into the base model that it was trained on."
            )

    def _create_and_replace(
        self,
        peft_config: LoTRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")

        kwargs = dict(zip(("r", "alpha"), peft_config.ranks_and_alpha(current_key), strict=True))
        if isinstance(target, LoTRALayer):
            target.update_layer(adapter_name, config=peft_config, **kwargs)
            return
        _, spec, _ = locate_target(current_key, target)
        layer_cls = SlimLoTRALayer if isinstance(target, (SlimKANLinear, SlimLayer)) else LoTRALayer
        new_module = layer_cls(target, spec, adapter_name, config=peft_config, **kwargs)
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
        guard_network(self.model, current_key, spec)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would look for `.weight`, and on unloading put one on the KAN layer. A layer that the model uses
        # in several places is replaced in all of them; devices are taken care of by update_layer.
        for module in list(self.model.modules()):
            for name, place in list(module._modules.items()):  # named_children() leaves out repetitions
                if place is child:
                    setattr(module, name, new_module)

    ###########
    # Loading #
    ###########

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuses tensors that do not fit before the first of them is loaded. Called by `load_state_dict`."""
        wrong, adapters, loaded = [], set(), set()
        for name, layer in lotra_layers(self.model):
            for component in layer.adapter_layer_names:
                for adapter, parameter in getattr(layer, component).items():
                    tensor = state_dict.get(f"{prefix}model.{name}.{component}.{adapter}")
                    if tensor is not None:
                        loaded.add(adapter)
                    if tensor is not None and tensor.shape != parameter.shape:
                        adapters.add(adapter)
                        wrong.append(
                            f"{name}.{component}: {tuple(tensor.shape)} in the checkpoint, {tuple(parameter.shape)} "
                            f"in the model, whose layer has the shape (out, in, basis) = {layer.lotra_tensor.shape}"
                        )
        if wrong:
            for adapter in adapters & self._awaited_adapters.keys():
                # PEFT has injected it only to load it. Take it out, so that the failed attempt changes nothing.
                self._take_out(adapter, self._awaited_adapters.pop(adapter))
                del self.peft_config[adapter]
            if not self.peft_config and hasattr(self.model, "peft_config"):
                del self.model.peft_config
            raise ValueError(
                "The adapter does not fit the model, nothing was loaded:\n  " + "\n  ".join(wrong) + "\nLoad it into "
                "the base model that it was trained on."
            )
        for adapter in loaded:
            self._awaited_adapters.pop(adapter, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # From PEFT 0.20 on. For tensors that come without a config, for an adapter that is there.
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = list(lotra_layers(model, adapter_name))
        own = {f"{name}.{part}.{adapter_name}" for name, layer in layers for part in layer.adapter_layer_names}
        wrong = [f"{name} is missing" for name in sorted(own - state_dict.keys())]
        # Those of other adapters, which PEFT 0.19 saves along, would be written over adapters of these names.
        endings = LoTRALayer.adapter_layer_names
        state_dict = {k: v for k, v in state_dict.items() if k in own or not k.rpartition(".")[0].endswith(endings)}
        existing = model.state_dict().keys()
        for name, tensor in state_dict.items():
            if name in own:
                wrong += [f"{name} has values that are not finite"] if not torch.isfinite(tensor).all() else []
            elif f".modules_to_save.{adapter_name}." not in name and name in existing - _embeddings(model):
                wrong.append(f"{name} would be written over, which is no part of the adapter")
        if wrong:
            raise ValueError("The tensors are not those of the adapter, nothing was loaded:\n  " + "\n  ".join(wrong))
        return state_dict

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # By the names of the tensors: PEFT looks for the names of the layers in the model, which are not those in the
        # state dict where FSDP wraps the layers.
        endings = tuple(f".{component}.{adapter_name}" for component in LoTRALayer.adapter_layer_names)
        tensors = {key: value for key, value in state_dict.items() if key.endswith(endings)}
        for key, tensor in tensors.items():
            # FSDP has flat views of what this process holds, fully_shard DTensors
            whole = tensor.dim() == (3 if ".lotra_core." in key else 2)
            if not whole or hasattr(tensor, "placements") or hasattr(tensor, "local_shards"):
                raise ValueError(
                    f"{key} is a part of a tensor, {tuple(tensor.shape)}, which is spread over several processes. "
                    "Gather whole tensors on all of them, with torch.distributed.checkpoint.state_dict: `state_dict = "
                    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, and pass them: "
                    "`save_pretrained(folder, state_dict=state_dict)`. For accelerate and Trainer, set FSDP's "
                    "`state_dict_type` to FULL_STATE_DICT."
                )
        return tensors

    ############################
    # Merging and unloading    #
    ############################

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        keep_base: bool = True,
        slim: Literal["densify", "truncate"] = "densify",
    ) -> None:
        """
        Merges the active adapters, or those named, into the base model; `unmerge_adapter` undoes it.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters.
            safe_merge (`bool`): Whether to check first that the merged weights are finite.
            keep_base (`bool`):
                Whether the adapted parameters are kept as they were, so that unmerging restores them bit for bit. It
                takes their memory once more. Otherwise the update is subtracted, and each cycle of merging and
                unmerging leaves rounding errors behind.
            slim (`str`): What becomes of Slim layers, see `merge_and_unload`.
        """
        self._set_slim_merge(slim)
        self._check_merge(adapter_names, safe_merge)
        for _, layer in lotra_layers(self.model):
            layer.keep_base = keep_base
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(self, *args, slim: Literal["densify", "truncate"] = "densify", **kwargs) -> nn.Module:
        """
        Merges the active adapters, or those named, into the base model, and returns it without a trace of LoTRA.

        Args:
            args, kwargs: As PEFT's (`progressbar`, `safe_merge`, `adapter_names`).
            slim (`"densify"` or `"truncate"`):
                What becomes of Slim layers, whose ranks an adapter adds to: a dense layer, exactly; or a Slim layer of
                the ranks that it had, by HOOI. The errors of that are in the attribute `merge_errors` of the model
                that is returned, by layer, as shares of the norm of the merged coefficient tensors.
        """
        layers = self._set_slim_merge(slim)
        model = super().merge_and_unload(*args, **kwargs)
        errors = {name: layer.merge_error for name, layer in layers.items() if layer.merge_error is not None}
        if errors:
            model.merge_errors = errors
        return model

    def _set_slim_merge(self, slim: str) -> dict[str, SlimLoTRALayer]:
        if slim not in SLIM_MERGES:
            raise ValueError(f"`slim` is {slim!r}, but must be one of {SLIM_MERGES}.")
        layers = {name: layer for name, layer in lotra_layers(self.model) if isinstance(layer, SlimLoTRALayer)}
        for layer in layers.values():
            layer.slim_merge = slim
        return layers

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        release_networks(model)
        # pykan's `fit`, for one, expects its own parameters to be trainable
        for parameter, flag in self._requires_grad_of_base:
            parameter.requires_grad = flag
        return model

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raises what a merge would raise, before the first layer is merged."""
        if isinstance(adapter_names, (list, tuple)):
            self._check_known(adapter_names)
        if safe_merge:
            for _, layer in lotra_layers(self.model):
                layer.check_safe_merge(adapter_names)

    def _check_known(self, adapter_names: list[str]) -> None:
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter(s) {unknown} not found, the model has {list(self.peft_config)}.")

    def set_adapter(self, adapter_name: str | list[str], *args, **kwargs) -> None:
        self._check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        # newer versions of PEFT check this themselves
        if any(adapter_name in layer.merged_adapters for _, layer in lotra_layers(self.model)):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)

    add_weighted_adapter = add_weighted_adapter

    #################
    # Mixed batches #
    #################

    @exclusively_within
    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # If adapter_names is passed as an argument, we inject it into the forward arguments.
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            # nothing to do
            yield
            return

        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")

        adapter_names = RowNames(adapter_names)
        # A layer need not have each of the adapters, but a name that no layer has is a typo.
        layers = [layer for _, layer in lotra_layers(self.model)]
        unexpected_adapters = [
            name
            for name in adapter_names.distinct
            if name != "__base__" and not any(name in layer.lotra_core for layer in layers)
        ]
        if unexpected_adapters:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected_adapters))}")

        hook_handles = []
        try:
            for module in self.modules():
                if isinstance(module, (LoTRALayer, AuxiliaryTrainingWrapper)):
                    pre_forward = partial(_adapter_names_pre_forward_hook, adapter_names=adapter_names)
                    hook_handles.append(module.register_forward_pre_hook(pre_forward, with_kwargs=True))
            yield
        finally:
            for handle in hook_handles:
                handle.remove()


def _adapter_names_pre_forward_hook(target, args, kwargs, adapter_names):
    # pre-forward hook to inject the adapter_names argument when using mixed adapter batches inference
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _embeddings(model: nn.Module) -> set[str]:
    """The names of the embeddings of a transformers model, which PEFT can save along."""
    owners = []
    for which in ("input", "output"):
        try:
            owners.append(getattr(model, f"get_{which}_embeddings", lambda: None)())
        except NotImplementedError:  # what transformers says of models without embeddings, such as KANModel
            continue
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if any(module is owner for owner in owners if owner is not None)
        for key, _ in module.named_parameters()
    }
