# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which modules are adapted: those that are meant, under exact names, and none inside of another one."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from helpers import adapt, assert_same, inputs, lotra_layers, snapshot
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from stand_ins import FAMILIES, FastKANLayer
from torch import nn

from peft_lotra import LoTRAConfig, enable_mixed
from peft_lotra.kan import KAN


class Network(nn.Module):
    """A KAN layer `fc1` beside a linear layer `block.fc1`, whose name ends alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = FAMILIES["own"](3, 4)
        self.block = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": FAMILIES["own"](4, 2)})

    def forward(self, x):
        return self.block["fc2"](self.block["fc1"](self.fc1(x)))


MODELS = {
    "fc1": (Network, {"fc1", "block.fc2"}),
    "sequential": (
        lambda: nn.Sequential(FAMILIES["own"](3, 4), nn.Sequential(nn.Linear(4, 4), FAMILIES["own"](4, 2))),
        {"0", "1.1"},
    ),
    "kan": (
        lambda: nn.Sequential(KAN([3, 4, 2]), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        {"0.layers.0", "0.layers.1"},
    ),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


def read(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_all_kan_takes_no_module_whose_name_ends_alike(name, tmp_path):
    model = adapt(make(name))
    assert set(lotra_layers(model.base_model.model)) == MODELS[name][1]
    x = inputs()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == read(tmp_path)
    model.add_adapter("second", LoTRAConfig(r=2))  # now the names of the base layers end alike too
    assert set(model.peft_config["second"].base_layers) == MODELS[name][1]


def test_layers_to_transform_are_exact_in_a_file_too(tmp_path):
    def make_blocks():
        torch.manual_seed(0)
        blocks = nn.Sequential(FAMILIES["own"](3, 4), FAMILIES["own"](4, 4))
        other = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        return nn.ModuleDict({"blocks": blocks, "other": other})

    model = adapt(make_blocks(), layers_to_transform=[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_blocks(), tmp_path)
    for adapted in (model, loaded):
        assert set(lotra_layers(adapted.base_model.model)) == {"blocks.0"}
    assert read(tmp_path)["layers_to_transform"] is None and read(tmp_path)["target_modules"] == r"blocks\.0"


def test_a_file_with_names_that_end_alike_adapts_the_recorded_layers(tmp_path):
    """As older versions wrote it, for a model that had no `block` then."""

    class Small(Network):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleDict({"fc1": nn.Identity(), "fc2": nn.Identity()})

    model = adapt(Small())
    model.save_pretrained(tmp_path)
    assert read(tmp_path)["target_modules"] == "fc1"
    config = LoTRAConfig.from_pretrained(tmp_path)
    config.target_modules = {"fc1"}
    network = make("fc1")
    network.fc1.load_state_dict(model.base_model.model.fc1.base_layer.state_dict())
    loaded = get_peft_model(network, config)
    assert set(lotra_layers(loaded.base_model.model)) == {"fc1"}


def test_many_names_are_written_whole(tmp_path):
    """PEFT shortens lists of 20 names or more to endings, which a larger model may have elsewhere too."""
    model = adapt(KAN([2] * 26), r=1)
    model.save_pretrained(tmp_path)
    assert read(tmp_path)["target_modules"] == sorted(f"layers.{index}" for index in range(25))


def test_what_the_user_types_is_a_suffix():
    with pytest.raises(ValueError, match=r"`block\.fc1` is a Linear"):
        adapt(make("fc1"), target_modules=["fc1"])
    model = adapt(make("sequential"), target_modules=["0", "1"], exclude_modules=["1.0", "1"])
    assert set(lotra_layers(model.base_model.model)) == {"0"}


class Outer(FastKANLayer):
    """A KAN layer with a KAN layer inside."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__(3, 4)
        self.inner = inner or FAMILIES["own"](3, 3)

    def forward(self, x):
        return super().forward(self.inner(x))


def nest(inner: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(Outer(inner), FAMILIES["own"](4, 2))


def refused(model, config, **kwargs):
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"is a part of `0`, and both would have adapters"):
        get_peft_model(model, config, **kwargs)
    assert_same(model, before)


def test_a_target_inside_of_a_target():
    refused(nest(), LoTRAConfig(target_modules=["0", "0.inner"]))
    refused(nest(), LoTRAConfig(target_modules=r"0|.*\.inner"))
    assert set(lotra_layers(adapt(nest()))) == {"base_model.model.0", "base_model.model.1"}  # "all-kan": the outer one


@pytest.mark.parametrize("first, second", [("0", "0.inner"), ("0.inner", "0")])
def test_a_target_inside_of_the_target_of_another_adapter(first, second):
    model = adapt(nest(), target_modules=[first])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"is a part of `0`, and both would have adapters"):
        model.add_adapter("second", LoTRAConfig(target_modules=["1", second]))
    assert_same(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("mixed", [False, True])
def test_an_adapter_of_another_method_inside_of_a_target(mixed):
    enable_mixed()
    lora = LoraConfig(target_modules=["spline_linear"])
    model = get_peft_model(nest(), lora, mixed=mixed)
    if mixed:
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"is a part of `0`, and both would have adapters"):
            model.add_adapter("second", LoTRAConfig(target_modules=["0"]))
        assert_same(model, before)
    else:
        refused(model.base_model.model, LoTRAConfig(target_modules=["0"]))


@pytest.mark.parametrize("mixed", [False, True])
def test_an_adapter_of_another_method_is_not_put_inside_of_an_adapted_layer(mixed):
    """PEFT passes over modules inside of adapted layers."""
    enable_mixed()
    model = get_peft_model(nest(), LoTRAConfig(target_modules=["0"]), mixed=mixed)
    with pytest.raises(ValueError, match="excluded|not found in the base model|is a part of"):
        if mixed:
            model.add_adapter("second", LoraConfig(target_modules=["spline_linear"]))
        else:
            get_peft_model(model.base_model.model, LoraConfig(target_modules=["spline_linear"]))


class Tied(nn.Module):
    """A layer under two names, and in two places, as in KA-GNN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = FAMILIES["own"](3, 3)
        self.block = nn.ModuleDict({"kan": self.first, "bn": nn.BatchNorm1d(3)})
        self.head = self.alias = nn.Linear(3, 2)

    def forward(self, x):
        return self.alias(self.block["bn"](self.block["kan"](self.first(x))))


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["head"]}, {"target_modules": ["first"]}])
def test_a_layer_under_two_names(config, tmp_path):
    model, x = adapt(Tied(), **config), inputs()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    y = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Tied(), tmp_path)
        assert torch.equal(loaded(x), y)
        loaded.load_adapter(tmp_path, "second")
        loaded.load_adapter(tmp_path, "second")
        loaded.set_adapter("second")
        assert torch.equal(loaded(x), y)
        missing, unexpected = set_peft_model_state_dict(loaded, get_peft_model_state_dict(model), "second")
        assert not unexpected and not [name for name in missing if name.endswith(".second")]
        merged = model.merge_and_unload()
    assert merged.first is merged.block["kan"] and merged.state_dict().keys() == Tied().state_dict().keys()
    torch.testing.assert_close(merged(x), y)
