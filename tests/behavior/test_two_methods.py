# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on the KAN layers and PEFT's LoRA on a linear head, as docs/serving.md has it."""

import pytest
import torch
from helpers import X, adapt, assert_equal, lotra_layers, net
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRALayer


def both() -> PeftModel:
    model = adapt(net())
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    inject_adapter_in_model(config, model.base_model.model, adapter_name="head")
    return model.eval()


def test_both_are_trained_merged_and_the_base_is_not():
    model = both().train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert len(trained) == 7 + 2
    assert all("lotra_" in name or "lora_" in name for name in trained)

    model(X).square().sum().backward()

    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

    with model.disable_adapter():
        assert_equal(model(X), net()(X))
    y, merged = model.eval()(X), model.merge_and_unload()

    assert_close(merged(X), y)
    assert type(merged.head) is nn.Linear
    assert not any(isinstance(m, LoTRALayer | LoraLayer) for m in merged.modules())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_both_are_saved_and_loaded(is_trainable, tmp_path):
    model = both()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=is_trainable)
    config = PeftConfig.from_pretrained(tmp_path / "head")
    config.inference_mode = not is_trainable
    inject_adapter_in_model(config, again.base_model.model, adapter_name="head")
    result = set_peft_model_state_dict(again, load_peft_weights(tmp_path / "head"), adapter_name="head")

    assert not result.unexpected_keys
    assert_equal(again.eval()(X), model(X))
    assert not torch.equal(again(X), net()(X))
    assert sum(parameter.requires_grad for parameter in again.parameters()) == (7 + 2 if is_trainable else 0)


def test_a_model_with_lora_gets_lotra():
    base = inject_adapter_in_model(LoraConfig(target_modules=["head"], init_lora_weights=False), net())
    before = base(X)
    model = adapt(base, init_weights=True)

    assert_equal(model(X), before)
    assert len(lotra_layers(model)) == 2
