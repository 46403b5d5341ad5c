# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import adapt, nested
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN
from peft_lotra.tuner.targets import describe_targets, find_targets, locate_target, record_base


ALL = ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]


@pytest.mark.parametrize(
    "config, names",
    [
        ({}, ALL),
        ({"target_modules": "all-kan"}, ALL),
        ({"exclude_modules": ["layers.0"]}, ["body.0", "body.1", "tail.layers.1"]),
        ({"layers_to_transform": [1]}, ["body.1", "tail.layers.1"]),
        ({"target_modules": ["0"]}, ["body.0", "tail.layers.0"]),
        ({"target_modules": r"body\..*"}, ["body.0", "body.1"]),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_targets(config, names, adapted):
    model = nested()
    layers = {name: model.get_submodule(name) for name in ALL}
    if adapted:
        adapt(model, modules_to_save=["head"])
    config = LoTRAConfig(**config)
    before = config.to_dict()
    targets = find_targets(config, model)
    assert list(targets) == names and config.to_dict() == before
    for name, target in targets.items():
        assert target.layer is layers[name]
        assert target.coefficients.shape[:2] == target.coefficients.read(target.layer).shape[:2]
    assert targets["body.0" if "body.0" in names else "tail.layers.1"].spec.family == "peft-lotra"


def test_a_layer_that_another_method_adapted_is_no_target():
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    model = KAN([3, 4, 2])
    model.layers[1] = Wrapper(model.layers[1])
    with pytest.raises(ValueError, match="`layers.1` is a Wrapper"):
        find_targets(LoTRAConfig(), model)


def test_a_shared_layer_is_one_target():
    layer = KAN([3, 3]).layers[0]
    assert list(find_targets(LoTRAConfig(), nn.Sequential(layer, nn.Tanh(), layer))) == ["0"]


def test_the_description():
    targets = find_targets(LoTRAConfig(), nested())
    assert describe_targets(targets)["body.1"] == {"family": "cheby-kan", "shape": [4, 5, 5], "has_residual": False}


def test_the_record_has_hashes_of_the_unmerged_base():
    model = nested()
    layers = describe_targets(find_targets(LoTRAConfig(), model))
    before = record_base(model, layers)
    adapted = adapt(model)
    assert record_base(model, layers) == before
    adapted.merge_adapter()
    assert record_base(model, layers) == before and set(before["body.0"]) > {"grid", "parameters"}
    adapted.unmerge_adapter()
    with torch.no_grad():
        locate_target("body.0", model["body"][0]).layer.base_weight[0, 0] += 1
    after = record_base(model, layers)
    assert [name for name in before if after[name] != before[name]] == ["body.0"]
    assert record_base(model, {"nowhere": layers["body.0"]}) == {"nowhere": layers["body.0"]}
