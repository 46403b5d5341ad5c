# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
from collections import OrderedDict

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, LoTRAModel
from peft_lotra.tuner.peft_methods import enclose


def test_models_of_other_methods_pass_through():
    """What PEFT leaves behind for another method is as without this package."""

    model = get_peft_model(nn.Sequential(OrderedDict(lin=nn.Linear(2, 2))), LoraConfig(target_modules=["lin"]))
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("missing")
    model.add_adapter("other", LoraConfig(target_modules=["lin"]))
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and "_change_lock" not in vars(model.base_model)


def test_methods_of_peft_are_enclosed_once():
    method = PeftModel.load_adapter
    enclose([PeftModel], LoTRAModel, LoTRAConfig)
    assert inspect.unwrap(PeftModel.load_adapter) is inspect.unwrap(method) is method.__wrapped__
    assert "model_id" in inspect.signature(PeftModel.load_adapter).parameters
