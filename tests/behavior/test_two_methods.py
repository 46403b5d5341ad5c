# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on the KAN layers and PEFT's LoRA on a linear head, as docs/serving.md has it."""

import torch
from behaving import X, adapted, layers, net
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn

from peft_lotra import LoTRALayer


def both() -> PeftModel:
    model = adapted(net())
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    inject_adapter_in_model(config, model.base_model.model, adapter_name="head")
    return model.eval()


def loaded(folder, is_trainable: bool = False) -> PeftModel:
    model = PeftModel.from_pretrained(net(), folder, is_trainable=is_trainable)
    config = PeftConfig.from_pretrained(folder / "head")
    config.inference_mode = not is_trainable
    inject_adapter_in_model(config, model.base_model.model, adapter_name="head")
    found = set_peft_model_state_dict(model, load_peft_weights(folder / "head"), adapter_name="head")
    assert not found.unexpected_keys
    return model.eval()


def test_both_are_trained_and_the_base_is_not():
    model = both().train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 4 + 2 and all("lotra_" in name or "lora_" in name for name in trained)
    model(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))


def test_both_are_saved_and_loaded(tmp_path):
    model = both()
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(again(X), model(X)) and not torch.equal(again(X), net()(X))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    further = {name for name, parameter in loaded(tmp_path, True).named_parameters() if parameter.requires_grad}
    assert len(further) == 2 * 4 + 2


def test_both_are_merged():
    model = both()
    y, merged = model(X), model.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert type(merged.head) is nn.Linear and not any(isinstance(m, LoTRALayer | LoraLayer) for m in merged.modules())


def test_lora_before_lotra():
    base = inject_adapter_in_model(LoraConfig(target_modules=["head"], init_lora_weights=False), net())
    before = base(X)
    model = adapted(base, init_weights=True)
    assert torch.equal(model(X), before) and len(layers(model)) == 2
