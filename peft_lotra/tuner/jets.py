# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Register the wrappers of PEFT for `jet` and for the search for KAN layers, when this module is imported."""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor

from ..derivatives.api import jet
from ..derivatives.chain_rule import Jet
from ..derivatives.stages import Entry, Stage, register, stages_of
from ..layers.search import NOT_SEARCHED
from .layer import LoTRALayer
from .linear_path import LinearPath, active_module


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


def _with_path(
    model: LinearPath,
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of scale * network + W x + b: W adds to the first derivatives only."""
    collapse = False if weights is None else weights
    value, *derivatives = jet(model.network, x, directions, order=order, collapse=collapse)
    path = model.path
    slopes = directions @ path.weight.T
    derivatives = [path.scale * derivative for derivative in derivatives]
    shape = [len(slopes), *[1] * (x.dim() - 1), -1]
    derivatives[0] = derivatives[0] + slopes.view(shape)
    return [path(x, value), *derivatives]


NOT_SEARCHED.append(AuxiliaryTrainingWrapper)
register(LoTRALayer, Entry(_lotra_layer))
register(ParamWrapper, Entry(_lora_on_parameter))
register(PeftModel, Entry(inner=lambda model: model.get_base_model()))
register(PeftMixedModel, Entry(inner=lambda model: model.base_model))
register(BaseTuner, Entry(inner=lambda tuner: tuner.model))
register(ModulesToSaveWrapper, Entry(inner=active_module))
register(LinearPath, Entry(jet=_with_path))
