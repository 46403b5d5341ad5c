# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import adapt, nested
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.tuner.injection import (
    differ,
    mismatches,
    prepare_targets,
    replace_module,
    select_to_load,
    select_to_save,
)


def test_all_kan_is_replaced_by_the_names_of_the_layers():
    config = LoTRAConfig()
    targets = prepare_targets(config, nested())
    assert config.target_modules == set(targets) == set(config.base_layers)


def test_a_module_is_replaced_in_all_its_places():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(old, nn.Sequential(old), nn.Tanh())
    replace_module(model, old, new)
    assert model[0] is model[1][0] is new


def test_tensors_differ_in_shape_or_kind():
    ours = torch.zeros(2)
    assert "(3,) in the checkpoint, (2,) in the model" in differ(torch.zeros(3), ours)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert not differ(ours.to(dtype), ours)
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        assert f"{dtype} in the checkpoint" in differ(ours.to(dtype), ours)
    assert not differ(torch.tensor(1), torch.tensor(1, dtype=torch.int32))


@pytest.fixture
def model():
    model = nested()
    adapt(model, target_modules=["body.0"], modules_to_save=["head"]).add_adapter("other", LoTRAConfig(r=1))
    return model


def test_the_components_of_one_adapter_are_saved(model):
    saved = select_to_save("default", model.state_dict())
    names = {f"body.0.lotra_{part}.default" for part in ("core", "factor_out", "factor_in", "factor_basis")}
    assert set(saved) == names
    with pytest.raises(ValueError, match="is a part of a tensor, .*spread over several processes"):
        select_to_save("default", {name: tensor.flatten() for name, tensor in saved.items()})


def test_other_shapes_are_told(model):
    state = {f"prefix.{name}": tensor for name, tensor in model.state_dict().items()}
    assert mismatches(model, state, "prefix.") == mismatches(model, {}, "prefix.") == []
    state["prefix.body.0.lotra_core.other"] = torch.zeros(2, 2, 2)
    (line,) = mismatches(model, state, "prefix.")
    assert "body.0.lotra_core: (2, 2, 2) in the checkpoint, (1, 1, 1) in the model" in line


def test_tensors_to_load(model):
    good = {**select_to_save("default", model.state_dict())}
    head = {"head.modules_to_save.default.weight": torch.zeros(2, 5)}
    other = {"body.0.lotra_core.other": torch.zeros(1, 1, 1)}
    assert select_to_load(model, "default", {**good, **head, **other}).keys() == {**good, **head}.keys()
    name = next(iter(good))
    bad = {
        "is missing": {key: value for key, value in good.items() if key != name},
        "not finite": {**good, name: good[name] / 0},
        "would be written over": {**good, "body.0.base_layer.spline_weight": torch.zeros(1)},
    }
    for message, state in bad.items():
        with pytest.raises(ValueError, match=f"(?s)nothing was loaded:.*{message}"):
            select_to_load(model, "default", state)
