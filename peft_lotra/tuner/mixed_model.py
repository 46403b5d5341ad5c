# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA in PEFT's mixed models: different methods on the layers of one model."""

from __future__ import annotations

from functools import partial
from typing import Union

from peft import PeftConfig, PeftMixedModel, mixed_model
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_tuners
from peft.utils import PeftType
from torch import Tensor, nn

from ..files.checkpoint import refuse_for_model
from .config import LoTRAConfig
from .guards import release_networks
from .injection import (
    check_adapter_name,
    create_and_replace,
    mismatches,
    prepare_config,
    prepare_targets,
    replace_module,
)
from .layer import LoTRALayer
from .model import LoTRAModel
from .norm_stats import NormStatsTuner
from .peft_methods import enclose
from .transaction import change_lock, configs_among, creation, is_switched, whole


# what PEFT wires its own methods into by hand
_WIRED = ("COMPATIBLE_TUNER_TYPES", "Configs", "Layers", "PREFIXES", "MixedModel")


class LoTRAMixedModel(NormStatsTuner, mixed_tuners.MixedModel):
    """PEFT's `MixedModel`, which also takes LoTRA configurations; made by [`enable_mixed`]."""

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        with change_lock(self).held, creation(model, configs_among(args, kwargs)):
            super().__init__(model, *args, **kwargs)

    @whole
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        # PEFT passes the wrapped model for all adapters but the first, and a file has the names in the base
        config = self.peft_config[adapter_name]
        if isinstance(config, LoTRAConfig):
            check_adapter_name(adapter_name)
            with config.handed_over(self.peft_config, adapter_name):
                super().inject_adapter(self.model, adapter_name, *args, **kwargs)
            return
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuses tensors that do not fit before the first of them is loaded."""
        refuse_for_model(mismatches(self.model, state_dict, f"{prefix}model."))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    set_adapter = whole(NormStatsTuner.set_adapter, is_switched)
    delete_adapter = whole(NormStatsTuner.delete_adapter)
    merge_adapter = whole(mixed_tuners.MixedModel.merge_adapter, is_switched, merges=True)
    unmerge_adapter = whole(mixed_tuners.MixedModel.unmerge_adapter, is_switched)
    _enable_adapter_layers = whole(NormStatsTuner._enable_adapter_layers, is_switched)

    def _prepare_adapter_config(self, peft_config, model_config):
        if isinstance(peft_config, LoTRAConfig):
            return prepare_config(peft_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config, model: nn.Module) -> None:
        if isinstance(peft_config, LoTRAConfig):
            self._targets = prepare_targets(peft_config, model)
        else:
            super()._prepare_model(peft_config, model)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        if isinstance(config, LoTRAConfig):
            create_and_replace(self, self._targets, config, adapter_name, target, current_key)
        else:
            super()._create_and_replace(
                config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(new_module, LoTRALayer) or isinstance(child, LoTRALayer):
            replace_module(self.model, child, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @partial(whole, merges=True)
    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        release_networks(model)
        return model


def enable_mixed() -> None:
    """Lets `get_peft_model(..., mixed=True)` and `PeftMixedModel` take LoTRA adapters beside those of other methods.

    PEFT's mixed models know their methods by name: five names in `peft.tuners.mixed` and `peft.mixed_model` are
    exchanged for the whole process. What PEFT's mixed models cannot do (saving; `adapter_names`) stays so.

    Raises:
        RuntimeError: This version of PEFT does not have those names. Nothing is changed then.

    Example:
        >>> from collections import OrderedDict
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_lotra import LoTRAConfig, enable_mixed
        >>> from peft_lotra.kan import KAN
        >>> enable_mixed()
        >>> model = nn.Sequential(OrderedDict(kan=KAN([2, 4, 4]), head=nn.Linear(4, 1)))
        >>> model = get_peft_model(model, LoTRAConfig(r=2), adapter_name="kan", mixed=True)
        >>> model.add_adapter("head", LoraConfig(target_modules=["head"]))
        >>> model.set_adapter(["kan", "head"])
    """
    if PEFT_TYPE_TO_MIXED_MODEL_MAPPING.get(PeftType["LOTRA"]) is LoTRAMixedModel:
        return
    missing = [name for name in _WIRED if not hasattr(mixed_tuners, name)]
    if missing:
        raise RuntimeError(
            f"peft.tuners.mixed.model has no {', '.join(missing)}: this version of PEFT makes its mixed models "
            "otherwise than those that peft-lotra knows (0.19.1 to 0.21). Use LoTRA by itself, or one of those."
        )
    types = (*mixed_tuners.COMPATIBLE_TUNER_TYPES, PeftType["LOTRA"])
    mixed.COMPATIBLE_TUNER_TYPES = mixed_tuners.COMPATIBLE_TUNER_TYPES = types
    mixed_tuners.Configs = Union[mixed_tuners.Configs, LoTRAConfig]  # noqa: UP007, PEFT reads its __args__
    mixed_tuners.Layers = (*mixed_tuners.Layers, LoTRALayer)
    mixed_tuners.PREFIXES.append(LoTRAModel.prefix)
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType["LOTRA"]] = LoTRAMixedModel
    enclose([PeftMixedModel], LoTRAMixedModel, PeftConfig)
    mixed_model.MixedModel = LoTRAMixedModel  # pyright: ignore[reportPrivateImportUsage]  (PEFT uses this name)
