# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import os
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from helpers import COMPONENTS, adapt, base, components, inputs, lotra_layers, nested
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig, LoTRAModel, find_kan_layers
from peft_lotra.kan import KAN


ALL = ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]


def adapted_names(model):
    return [name.removeprefix("base_model.model.") for name in lotra_layers(model)]


class Stack(nn.Module):
    """Blocks of two KAN layers in a `ModuleList`: `<name>.0.first`, `<name>.0.second`, ..."""

    def __init__(self, name: str, depth: int = 3) -> None:
        super().__init__()
        pairs = [nn.ModuleDict({k: FAMILIES["own"](3, 3) for k in ("first", "second")}) for _ in range(depth)]
        setattr(self, name, nn.ModuleList(pairs))
        self.name = name

    def forward(self, x):
        for block in getattr(self, self.name):
            x = block["second"](block["first"](x))
        return x


###########
# Targets #
###########


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, ALL),
        ({"target_modules": "all-kan"}, ALL),
        ({"target_modules": ["body.0", "tail.layers.1"]}, ["body.0", "tail.layers.1"]),
        ({"target_modules": ["0"]}, ["body.0", "tail.layers.0"]),
        ({"target_modules": ["layers.1"]}, ["tail.layers.1"]),
        ({"target_modules": r"tail\..*\.\d"}, ["tail.layers.0", "tail.layers.1"]),
        ({"target_modules": r".*1"}, ["body.1", "tail.layers.1"]),
        ({"exclude_modules": ["body.1"]}, ["body.0", "tail.layers.0", "tail.layers.1"]),
        ({"exclude_modules": r"tail.*"}, ["body.0", "body.1"]),
        ({"target_modules": ["0", "1"], "exclude_modules": ["layers.0"]}, ["body.0", "body.1", "tail.layers.1"]),
        ({"layers_to_transform": [0]}, ["body.0", "tail.layers.0"]),
        ({"layers_to_transform": 1}, ["body.1", "tail.layers.1"]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ["tail.layers.0"]),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["body"]}, ["body.0", "body.1"]),
        ({"layers_to_transform": 1, "exclude_modules": ["body.1"]}, ["tail.layers.1"]),
        ({"modules_to_save": ["head"]}, ALL),
    ],
)
def test_targets(config, expected):
    model = nested()
    x = inputs()
    before = model(x)
    adapted = get_peft_model(model, LoTRAConfig(**config))
    assert adapted_names(adapted) == expected
    assert torch.allclose(adapted.eval()(x), before)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    saved_whole = {name for name in trainable if "modules_to_save" in name}
    assert len(trainable - saved_whole) == 4 * len(expected)
    assert len(saved_whole) == (2 if "modules_to_save" in config else 0)


@pytest.mark.parametrize("name", ["blocks", "h"])
@pytest.mark.parametrize("targets", [None, ["first", "second"]])
@pytest.mark.parametrize("pattern", [True, False])
@pytest.mark.parametrize("indices, expected", [([1], ["1.first", "1.second"]), (2, ["2.first", "2.second"])])
def test_layer_indices_of_blocks(name, targets, pattern, indices, expected):
    config = {"target_modules": targets, "layers_to_transform": indices, "layers_pattern": name if pattern else None}
    model = get_peft_model(as_model(Stack(name=name)), LoTRAConfig(**config))
    assert adapted_names(model) == [f"kan.{name}.{suffix}" for suffix in expected]


def test_index_1_is_not_index_11():
    model = get_peft_model(KAN([2] * 13), LoTRAConfig(r=1, layers_to_transform=[1]))
    assert adapted_names(model) == ["layers.1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_by_default(family):
    model = as_model(nn.Sequential(nn.LayerNorm(3), FAMILIES[family](3, 4)))
    assert adapted_names(get_peft_model(model, LoTRAConfig())) == ["kan.1"]


def test_a_shared_layer_has_one_adapter(tmp_path):
    layer = FAMILIES["own"](3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    fresh = copy.deepcopy(model)
    x = inputs()
    adapted = adapt(model)
    y = adapted(x)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(x), y)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y)
    assert model[0] is layer and model[2] is layer


def test_injection_into_a_model():
    model = nested()
    x = inputs()
    before = model(x)
    injected = inject_adapter_in_model(LoTRAConfig(target_modules=["body.0"]), model)
    assert injected is model and list(lotra_layers(model)) == ["body.0"]
    assert torch.equal(model(x), before)


def test_a_second_adapter_starts_inactive_and_has_its_own_targets():
    model = adapt(nested(), target_modules=["body.0"])
    x = inputs()
    y = model(x)
    model.add_adapter("other", LoTRAConfig(r=3, target_modules=["body.0", "tail.layers.0"], init_weights=False))
    assert model.active_adapters == ["default"] and torch.equal(model.eval()(x), y)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in components(model) if name.endswith("default")
    }
    model.set_adapter("other")
    assert not torch.allclose(model(x), y)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in components(model) if name.endswith("other")
    }
    assert model.base_model.model.body[0].lotra_r == {"default": (2, 3, 4), "other": (3, 3, 3)}


###################
# Ranks and scale #
###################


def test_rank_and_alpha_patterns():
    config = LoTRAConfig(
        r=2,
        rank_pattern={"body.1": (1, 2, 3), "layers.0": 4, r"^tail.*\.1$": (5, 1, 1)},
        alpha=0.5,
        alpha_pattern={"body.0": 2.0, r"tail\.layers\.\d": 3.0},
    )
    layers = lotra_layers(get_peft_model(nested(), config).base_model.model)
    assert {name: layer.lotra_r["default"] for name, layer in layers.items()} == {
        "body.0": (2, 2, 2),
        "body.1": (1, 2, 3),
        "tail.layers.0": (4, 4, 4),
        "tail.layers.1": (5, 1, 1),
    }
    assert {name: layer.lotra_scaling["default"] for name, layer in layers.items()} == {
        "body.0": 2.0,
        "body.1": 0.5,
        "tail.layers.0": 3.0,
        "tail.layers.1": 3.0,
    }


@pytest.mark.parametrize("r", [1, 4, 1000, (1, 2, 3), (9, 1, 1000)])
def test_the_number_of_parameters(r):
    model = get_peft_model(KAN([5, 7, 2]), LoTRAConfig(r=r))
    expected = 0
    for out, in_, basis in ((7, 5, 9), (2, 7, 9)):
        ranks = r if isinstance(r, tuple) else (r, r, r)
        ro, ri, rb = min(ranks[0], out), min(ranks[1], in_), min(ranks[2], basis)
        expected += ro * ri * rb + out * ro + in_ * ri + basis * rb
    assert model.get_nb_trainable_parameters()[0] == expected


#########
# Files #
#########


def test_what_is_written(tmp_path):
    model = adapt(KAN([4, 16, 16, 1]), r=2)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4000
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    expected = {f"base_model.model.layers.{index}.{name}" for index in range(3) for name in COMPONENTS}
    assert set(tensors) == expected
    for name, parameter in components(model):
        assert torch.equal(tensors[name.removesuffix(".default")], parameter)


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle")

    model = adapt(nested(), modules_to_save=["head"])
    for module, name in (
        (torch, "load"),
        (torch, "save"),
        (pickle, "load"),
        (pickle, "Unpickler"),
        (pickle, "Pickler"),
    ):
        monkeypatch.setattr(module, name, refuse)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(nested(), tmp_path).load_adapter(tmp_path, "again")


def test_modules_to_save_are_written_and_loaded(tmp_path):
    model = nested()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, modules_to_save=["head"])
    with torch.no_grad():
        adapted.base_model.model["head"].weight.add_(1)
    adapted.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    heads = {name for name in tensors if "lotra_" not in name}
    assert heads == {"base_model.model.head.weight", "base_model.model.head.bias"}
    fresh = nested()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    x = inputs()
    assert torch.equal(loaded(x), adapted(x))


def test_several_adapters_are_written_and_loaded(tmp_path):
    model = nested()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, r=(1, 2, 3), rank_pattern={"body.1": 3}, alpha_pattern={"tail.layers.0": 0.5})
    adapted.add_adapter("other", LoTRAConfig(r=3, target_modules=["body.0"], adapt_residual=False, init_weights=False))
    adapted.eval().save_pretrained(tmp_path)
    fresh = nested()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    x = inputs()
    for name in ("default", "other"):
        adapted.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(x), adapted(x))


def test_nothing_warns_on_the_ordinary_way(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = KAN([3, 4, 2])
        fresh = copy.deepcopy(model)
        adapted = get_peft_model(model, LoTRAConfig(r=2))
        adapted(inputs()).sum().backward()
        adapted.save_pretrained(tmp_path)
        PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload()
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        adapted.merge_and_unload()


#############
# The model #
#############


def test_the_base_model():
    model = adapt(nested())
    assert type(model.base_model) is LoTRAModel
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers) == ({"default": "LOTRA"}, 4)
    assert status.enabled and status.active_adapters == ["default"] and not status.merged_adapters
    assert find_kan_layers(model)[0].name == "body.0"


class WithLoop(nn.Sequential):
    """Its `train` is a training loop, as in pykan of 2024."""

    def train(self, dataset, steps=20):
        raise AssertionError("nobody asked for it")


def test_a_network_whose_train_is_a_training_loop(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(WithLoop(KAN([3, 4]), nn.Dropout()))

    x = inputs()
    model = adapt(build(), init_weights=False)
    model.eval()
    assert not any(module.training for module in model.modules())
    y = model(x)
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        other = PeftModel.from_pretrained(build(), tmp_path, is_trainable=is_trainable)
        assert {module.training for module in other.modules()} == {is_trainable}
        torch.testing.assert_close(other.eval()(x), y)
    assert model.train() is model and all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="expected `True`"):
        model.base_model.train("yes")


def test_requires_grad_of_the_base_is_restored():
    model = nested()
    model["head"].bias.requires_grad_(False)
    model["body"][0].base_weight.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    for unload in ("unload", "merge_and_unload"):
        adapted = adapt(model)
        adapted.add_adapter("other", LoTRAConfig())
        assert [(name, p.requires_grad) for name, p in getattr(adapted, unload)().named_parameters()] == before


def test_deleting_and_adding_again():
    model = adapt(base("own"))
    model.add_adapter("other", LoTRAConfig(r=1))
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"] and model.active_adapters == ["other"]
    model.add_adapter("default", LoTRAConfig(r=3))
    (layer,) = lotra_layers(model).values()
    assert layer.lotra_r == {"other": (1, 1, 1), "default": (3, 3, 3)}
