# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which modules are adapted: those that are meant, under exact names, and none inside of another one."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from helpers import adapt, assert_same, inputs, lotra_layers, nested, snapshot
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from stand_ins import FAMILIES, FastKANLayer
from torch import nn
from torch.nn.utils import parametrizations, prune

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.kan import KAN


ALL = ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]


def names_of(model):
    return [name.removeprefix("base_model.model.") for name in lotra_layers(model)]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"target_modules": "all-kan"}, ALL),
        ({"target_modules": ["0"]}, ["body.0", "tail.layers.0"]),
        ({"target_modules": ["layers.1"]}, ["tail.layers.1"]),
        ({"target_modules": r"tail\..*\.\d"}, ["tail.layers.0", "tail.layers.1"]),
        ({"exclude_modules": ["body.1"]}, ["body.0", "tail.layers.0", "tail.layers.1"]),
        ({"target_modules": ["0", "1"], "exclude_modules": ["layers.0"]}, ["body.0", "body.1", "tail.layers.1"]),
        ({"layers_to_transform": [0]}, ["body.0", "tail.layers.0"]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ["tail.layers.0"]),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["body"]}, ["body.0", "body.1"]),
        ({"layers_to_transform": 1, "exclude_modules": ["body.1"]}, ["tail.layers.1"]),
        ({"modules_to_save": ["head"]}, ALL),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_targets(config, expected, again):
    model, x = nested(), inputs()
    before = model(x)
    if again:
        model = adapt(model, adapter_name="first", r=1)
        model.add_adapter("default", LoTRAConfig(**config))
        model.set_adapter("default")
    else:
        model = get_peft_model(model, LoTRAConfig(**config))
    layers = lotra_layers(model.base_model.model)
    assert [name for name, layer in layers.items() if "default" in layer.lotra_r] == expected
    assert torch.allclose(model.eval()(x), before)
    assert sum(p.requires_grad for n, p in model.named_parameters() if "lotra_" in n) == 4 * len(expected)


REFUSED = {
    "no KAN layer": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), {}, "No KAN layer was found"),
    "no KAN layer, named": (nested, {"target_modules": ["body.0", "head"]}, "`head` is a Linear, which is not a KAN"),
    "a container": (nested, {"target_modules": ["tail"]}, "`tail` is a KAN,"),
    "nothing of the name": (nested, {"target_modules": ["nowhere"]}, "nowhere"),
    "all-linear": (nested, {"target_modules": "all-linear"}, "all-linear"),
    "no such index": (nested, {"layers_to_transform": [7]}, "body.0.*`layers_to_transform`"),
    "no such list": (nested, {"layers_to_transform": 0, "layers_pattern": "no"}, "`layers_pattern`=no"),
    "everything excluded": (nested, {"exclude_modules": ".*"}, "xclude"),
    "nothing to save": (nested, {"modules_to_save": ["haed", "head"]}, "`modules_to_save` has 'haed'"),
    "a bare layer": (lambda: FAMILIES["own"](3, 4), {}, "itself a KAN layer.*Wrap it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_changes_nothing(kind):
    make, config, words = REFUSED[kind]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, LoTRAConfig(**config))
    assert_same(model, before)
    if make is nested and kind != "no KAN layer, named":
        adapted, x = adapt(nested(), adapter_name="existing", modules_to_save=["head"]), inputs()
        before, y = snapshot(adapted), adapted(x)
        with pytest.raises(ValueError, match=words):
            adapted.add_adapter("other", LoTRAConfig(**config))
        assert_same(adapted, before)
        assert list(adapted.peft_config) == ["existing"] and torch.equal(adapted(x), y)


@pytest.mark.parametrize("name", ["", "__base__", "keys", "training", "with.dot", 3])
def test_names_that_no_adapter_can_have(name):
    for model in (KAN([3, 4]), adapt(KAN([3, 4]))):
        before = snapshot(model)
        with pytest.raises((ValueError, KeyError, TypeError)):
            if isinstance(model, KAN):
                get_peft_model(model, LoTRAConfig(r=1), adapter_name=name)
            else:
                model.add_adapter(name, LoTRAConfig(r=1))
        assert_same(model, before)


def weight_norm(layer, name):
    parametrizations.weight_norm(layer, name)


def pruned(layer, name):
    prune.l1_unstructured(layer, name, amount=0.3)


def integers(layer, name):
    value = (getattr(layer, name) * 100).to(torch.int8)
    setattr(layer, name, nn.Parameter(value, requires_grad=False))


def another_shape(layer, name):
    setattr(layer, name, nn.Parameter(getattr(layer, name).detach().flatten(1)))


@pytest.mark.parametrize("change", [weight_norm, pruned, integers, another_shape])
def test_parameters_that_cannot_be_adapted(change):
    model = nested()
    change(model["tail"].layers[1], "spline_weight")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="spline_weight"):
        get_peft_model(model, LoTRAConfig())
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_layers_that_share_a_parameter():
    model = KAN([3, 3, 3])
    model.layers[1].base_weight = model.layers[0].base_weight
    with pytest.raises(ValueError, match="share the parameter `base_weight`"):
        get_peft_model(model, LoTRAConfig())
    adapt(model, target_modules=["layers.0"])


class Network(nn.Module):
    """A KAN layer `fc1` beside a linear layer `block.fc1`, whose name ends alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = FAMILIES["own"](3, 4)
        self.block = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": FAMILIES["own"](4, 2)})

    def forward(self, x):
        return self.block["fc2"](self.block["fc1"](self.fc1(x)))


def test_names_that_end_alike(tmp_path):
    model, x = adapt(Network()), inputs()
    assert names_of(model) == ["fc1", "block.fc2"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Network(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    model.add_adapter("second", LoTRAConfig(r=2))  # now the names of the base layers end alike too
    assert all(set(layer.lotra_r) == {"default", "second"} for layer in lotra_layers(model).values())
    with pytest.raises(ValueError, match=r"`block\.fc1` is a Linear"):
        adapt(Network(), target_modules=["fc1"])


def test_names_that_a_file_sorts(tmp_path):
    """`layers.10` comes before `layers.2` in the file, and the layers are alike."""
    torch.manual_seed(0)
    network, x = KAN([2] * 13), torch.rand(5, 2)
    model = adapt(copy.deepcopy(network), r=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path)
    assert torch.equal(loaded(x), model(x))
    other = adapt(network, r=1)
    hotswap_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_many_names_are_written_whole(tmp_path):
    """PEFT shortens lists of 20 names or more to endings, which a larger model may have elsewhere too."""
    adapt(KAN([2] * 26), r=1).save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(f"layers.{index}" for index in range(25))


class Outer(FastKANLayer):
    """A KAN layer with a KAN layer inside."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.inner = FAMILIES["own"](3, 3)

    def forward(self, x):
        return super().forward(self.inner(x))


def nest() -> nn.Module:
    return nn.Sequential(Outer(), FAMILIES["own"](4, 2))


def test_a_target_inside_of_a_target():
    model = nest()
    before = snapshot(model)
    with pytest.raises(ValueError, match="is a part of"):
        get_peft_model(model, LoTRAConfig(r=2, target_modules=r"0|.*\.inner"))
    assert_same(model, before)
    assert names_of(adapt(nest())) == ["0", "1"]  # "all-kan": the outer one


def test_beside_another_method():
    model, x = nn.Sequential(FAMILIES["own"](3, 4), nn.Linear(4, 2)), inputs()
    lora = LoraConfig(target_modules=["1"], init_lora_weights=False)
    inject_adapter_in_model(lora, model)
    before = model(x)
    adapted = adapt(model, random=False)
    assert torch.equal(adapted(x), before) and names_of(adapted) == ["0"]


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


@pytest.mark.parametrize("config", [{}, {"target_modules": ["first"]}])
def test_a_layer_under_two_names(config, tmp_path):
    model, x = adapt(Tied(), **config), inputs()
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Tied(), tmp_path)
        assert torch.equal(loaded(x), y)
        loaded.load_adapter(tmp_path, "second")
        loaded.set_adapter("second")
        assert torch.equal(loaded(x), y)
        set_peft_model_state_dict(loaded, get_peft_model_state_dict(model), "second")
        assert torch.equal(loaded(x), y)
        merged = model.merge_and_unload()
    assert merged.first is merged.block["kan"] and merged.state_dict().keys() == Tied().state_dict().keys()
    torch.testing.assert_close(merged(x), y)
