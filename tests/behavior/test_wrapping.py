# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""KANs inside of other modules, and what is found in models."""

import pytest
import torch
from behaving import X, adapted, add, apart, layers, net
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_lotra import LoTRAConfig, check_kan_layer, find_kan_layers, model_summary, register_kan_layer
from peft_lotra.kan import KAN, KANLinear


class Cosines(nn.Module):
    """y[o] = sum_{i,k} weights[i,o,k] cos(k x[i])."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(inputs, outputs, 3))

    def forward(self, x):
        return torch.einsum("bik,iok->bo", (x[..., None] * torch.arange(3)).cos(), self.weights)


def test_one_layer_in_several_places():
    layer = KANLinear(3, 3)
    base = nn.Sequential(nn.Sequential(layer, nn.Tanh()), layer, KAN([3, 2]))
    y, model = base(X).detach(), adapted(base)
    changed = model(X)
    assert len(set(layers(model).values())) == 2 and apart(changed, y) > 1e-3
    assert apart(model.merge_and_unload()(X), changed) < 1e-5


def test_inject():
    base = net()
    model = inject_adapter_in_model(LoTRAConfig(r=2, init_weights=False, target_modules=["layers.1"]), base)
    assert model is base and list(layers(model)) == ["kan.layers.1"] and apart(model(X), net()(X)) > 1e-3
    tensors = get_peft_model_state_dict(model)
    assert len(tensors) == 4
    other = inject_adapter_in_model(LoTRAConfig(r=2), net(), state_dict=tensors)
    set_peft_model_state_dict(other, tensors)
    assert list(layers(other)) == ["kan.layers.1"] and torch.equal(model(X), other(X))


def test_summary():
    assert [(line.layer, line.adapter) for line in model_summary(net())] == [(f"kan.layers.{i}", None) for i in (0, 1)]
    model = adapted()
    add(model, "other")
    summary = model_summary(model)
    lines = {(line.layer, line.adapter): line for line in summary}
    assert set(lines) == {(f"kan.layers.{i}", name) for i in (0, 1) for name in ("default", "other")}
    line, other = lines["kan.layers.0", "default"], lines["kan.layers.0", "other"]
    assert (line.ranks, line.shape, line.active, line.merged) == ((2, 3, 4), (6, 3, 8), True, False)
    assert line.trainable == line.parameters > 0 == other.trainable and not other.active
    assert (summary.trainable_parameters, summary.all_parameters) == model.get_nb_trainable_parameters()
    model.merge_adapter()
    assert model_summary(model)[0].merged and "kan.layers.0" in str(summary)


def test_find_and_check():
    for model in (net(), adapted()):
        found = [(layer.name, layer.shape) for layer in find_kan_layers(model)]
        assert found == [("kan.layers.0", (6, 3, 8)), ("kan.layers.1", (4, 6, 8))]
    for layer in (net().kan.layers[0], next(iter(layers(model).values()))):
        report = check_kan_layer(layer)
        assert (report.shape, report.coverage, report.linear) == ((6, 3, 8), 1, "yes")
        assert set(report.roles.values()) >= {"coefficients", "residual"}
    with pytest.raises(ValueError, match="Linear"):
        check_kan_layer(nn.Linear(2, 2))


def test_a_layer_of_ones_own():
    register_kan_layer("cosines", matches=Cosines, coefficients=("weights", "i o k"))
    model = adapted(nn.Sequential(Cosines(3, 4), nn.Tanh(), Cosines(4, 2)), r=2)
    y = model(X)
    assert [line.family for line in model_summary(model)] == ["cosines", "cosines"]
    assert next(iter(layers(model).values())).get_base_weight().shape == (4, 3, 3)
    merged = model.merge_and_unload()
    assert type(merged[0]) is Cosines and apart(merged(X), y) < 1e-5


def test_lora_on_linear_layers_beside_lotra(tmp_path):
    """The recipe of docs/serving.md, in place of a mixed model."""
    lora = LoraConfig(target_modules=["head"], init_lora_weights=False)
    model = adapted()
    inject_adapter_in_model(lora, model.get_base_model(), "lora")
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default", "weight"}  # of `lotra_core.default`, of `lora_A.lora.weight`
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    inject_adapter_in_model(lora, loaded.get_base_model(), "lora")
    set_peft_model_state_dict(loaded, load_file(tmp_path / "lora" / "adapter_model.safetensors"), "lora")
    assert torch.equal(loaded(X), model(X))
