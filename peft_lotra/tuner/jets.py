# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Teaches `jet`, and the search for KAN layers, what PEFT puts around modules. Importing this module registers it."""

from __future__ import annotations

from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..derivatives.stages import Entry, Stage, register, stages_of
from ..layers.registry import NOT_SEARCHED
from .layer import LoTRALayer


def _only_stage(model: LoTRALayer | ParamWrapper) -> Stage | None:
    """The stage of the base layer, `None` if the base layer is not a single stage."""
    if model.disable_adapters and model.merged:
        model.unmerge()  # as its forward does
    stages = stages_of(model.base_layer)
    return stages[0] if stages is not None and len(stages) == 1 else None


def _lotra_layer(model: LoTRALayer) -> list[Stage] | None:
    stage = _only_stage(model)
    if stage is None or stage.formula is None:
        return None
    updates = (*stage.formula.updates, *model.applied_updates())
    return [stage._replace(formula=stage.formula._replace(updates=updates))]


def _lora_on_parameter(model: ParamWrapper) -> list[Stage] | None:
    """PEFT's LoRA on `target_parameters`: its updates are dense."""
    stage = _only_stage(model)
    if stage is None or stage.formula is None:
        return None
    weight = model.get_param()
    # in layers of other libraries a parameter of any name may be laid out otherwise
    terms = [name for name in ("coefficients", "residual") if getattr(stage.formula, name) is weight]
    if not terms:
        return None
    if not (model.merged or model.disable_adapters):
        for adapter in model.active_adapters:
            if adapter in model.lora_A:
                weight = weight + model.get_delta_weight(adapter)
    return [stage._replace(formula=stage.formula._replace(**{terms[0]: weight}))]


def _saved_module(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = [] if wrapper.disable_adapters else [n for n in wrapper.active_adapters if n in wrapper.modules_to_save]
    return wrapper.modules_to_save[active[0]] if active else wrapper.original_module


NOT_SEARCHED.append(AuxiliaryTrainingWrapper)
register(LoTRALayer, Entry(_lotra_layer))
register(ParamWrapper, Entry(_lora_on_parameter))
register(PeftModel, Entry(inner=lambda model: model.get_base_model()))
register(PeftMixedModel, Entry(inner=lambda model: model.base_model))
register(BaseTuner, Entry(inner=lambda tuner: tuner.model))
register(ModulesToSaveWrapper, Entry(inner=_saved_module))
