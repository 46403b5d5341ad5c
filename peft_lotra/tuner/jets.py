# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Register the wrappers of PEFT for `jet` and for the search for KAN layers, when this module is imported."""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..derivatives.stages import Entry, Stage, register, stages_of
from ..layers.search import NOT_SEARCHED
from .layer import LoTRALayer


def _only_stage(model: LoTRALayer | ParamWrapper) -> Any:
    """Return the stage of the base layer; None if it has several stages, or no formula."""
    if model.disable_adapters and model.merged:
        model.unmerge()  # like its forward
    stages = stages_of(model.base_layer)
    if stages is None or len(stages) != 1 or stages[0].formula is None:
        return None
    return stages[0]


def _lotra_layer(model: LoTRALayer) -> list[Stage] | None:
    stage = _only_stage(model)
    if stage is None:
        return None
    formula = stage.formula
    updates = (*formula.updates, *model.applied_updates())
    return [stage._replace(formula=formula._replace(updates=updates))]


def _lora_on_parameter(model: ParamWrapper) -> list[Stage] | None:
    """Return the stage of a layer with PEFT's LoRA on `target_parameters`, whose updates are dense."""
    stage = _only_stage(model)
    if stage is None:
        return None
    parameter = model.get_param()
    weight = parameter
    if not (model.merged or model.disable_adapters):
        for adapter in model.active_adapters:
            if adapter in model.lora_A:
                weight = weight + model.get_delta_weight(adapter)
    # compared by identity, since other libraries may lay out a parameter of the same name in another order
    for field in ("coefficients", "residual"):
        if getattr(stage.formula, field) is parameter:
            formula = stage.formula._replace(**{field: weight})
            return [stage._replace(formula=formula)]
    return None


def _saved_module(wrapper: ModulesToSaveWrapper) -> nn.Module:
    if not wrapper.disable_adapters:
        for adapter in wrapper.active_adapters:
            if adapter in wrapper.modules_to_save:
                return wrapper.modules_to_save[adapter]
    return wrapper.original_module


NOT_SEARCHED.append(AuxiliaryTrainingWrapper)
register(LoTRALayer, Entry(_lotra_layer))
register(ParamWrapper, Entry(_lora_on_parameter))
register(PeftModel, Entry(inner=lambda model: model.get_base_model()))
register(PeftMixedModel, Entry(inner=lambda model: model.base_model))
register(BaseTuner, Entry(inner=lambda tuner: tuner.model))
register(ModulesToSaveWrapper, Entry(inner=_saved_module))
