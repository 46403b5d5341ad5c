# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Arguments that make no sense, given to methods of adapted models: clear errors, and nothing changed."""

from __future__ import annotations

import pytest
from hostile import WRONG, Net, adapted, assert_refused, save
from hostile import assert_raised_here as refused
from peft import PeftModel
from torch import nn

from peft_lotra import LoTRAConfig, hotswap_adapter, preprocess_lotra, register_kan_layer
from peft_lotra.kan import KAN


def two():
    model = adapted(modules_to_save=["head"])
    model.add_adapter("two", LoTRAConfig(r=2, init_weights=False))
    return model


CALLS = {
    "load a number": lambda model: model.load_adapter(3, "x"),
    "load nothing": lambda model: model.load_adapter(None, "default"),
    "load into a number": lambda model: model.load_adapter("folder", 3),
    "add nothing": lambda model: model.add_adapter("x", None),
    "add a dict": lambda model: model.add_adapter("x", {"r": 2}),
    "add by number": lambda model: model.add_adapter(3, LoTRAConfig(r=2)),
    "set a list": lambda model: model.set_adapter(["default", "two"]),
    "delete a list": lambda model: model.delete_adapter(["default"]),
    "set nothing": lambda model: model.base_model.set_adapter(None),
    "merge a number": lambda model: model.merge_adapter(3),
    "merge a name": lambda model: model.merge_adapter("default"),
    "merge numbers": lambda model: model.merge_and_unload(adapter_names=[3]),
    "hotswap nothing": lambda model: hotswap_adapter(model, None),
    "hotswap a list": lambda model: hotswap_adapter(model, "folder", ["default"]),
    "save nowhere": lambda model: model.save_pretrained(None),
    "weights": lambda model: model.base_model.add_weighted_adapter(["default", "two"], None, "w"),
    "a weight": lambda model: model.base_model.add_weighted_adapter(["default"], ["x"], "w"),
    "scale": lambda model: model.base_model.model.kan.layers[0].set_scale("default", "x"),
    "scale by nothing": lambda model: model.base_model.model.kan.layers[0].scale_layer(None),
    "divide by zero": lambda model: model.base_model.model.kan.layers[0].unscale_layer(0),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_adapted_models(name):
    model = two()
    assert_refused(lambda: CALLS[name](model), model, error=WRONG)
    refused(lambda: CALLS[name](model))


@pytest.mark.parametrize("model", [None, 3, "model", Net, {}], ids=repr)
def test_a_base_that_is_no_model(tmp_path, model):
    refused(lambda: PeftModel.from_pretrained(model, save(tmp_path)), "must be a network")


@pytest.mark.parametrize("safe", [True, False])
def test_pickles_are_not_written(tmp_path, safe):
    """They could not be loaded."""
    model = two()
    if safe:
        model.save_pretrained(tmp_path, safe_serialization=True)
    else:
        refused(lambda: model.save_pretrained(tmp_path, safe_serialization=False), "safetensors only")
        assert not list(tmp_path.iterdir())


def test_a_name_that_no_folder_can_have():
    refused(lambda: adapted(adapter_name="\ud800"), "folders")


def test_functions_of_adapters():
    config = LoTRAConfig(init_weights="gradient")
    refused(lambda: preprocess_lotra(KAN([3, 2]), config, 3), "train_step")
    refused(lambda: preprocess_lotra(KAN([3, 2]), None, print), "config")
    refused(lambda: register_kan_layer("x", matches=3, coefficients=("weight", "o i k")), "matches")
    refused(lambda: register_kan_layer("x", matches=nn.Linear, coefficients=(1, 2)), "coefficients")
