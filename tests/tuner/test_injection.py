# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import adapt, assert_same, lotra_layers, nested, snapshot
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.tuner.injection import (
    differ,
    mismatches,
    prepare_targets,
    replace_module,
    select_to_load,
    select_to_save,
    take_out,
    transaction,
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


def test_what_is_taken_out_leaves_no_trace():
    model = nested()
    before = snapshot(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = adapt(model, modules_to_save=["head"])
    adapted.add_adapter("other", LoTRAConfig(r=2, target_modules=["body.0"]))
    take_out(model, "other", [])
    assert all(list(layer.lotra_core) == ["default"] for layer in lotra_layers(model).values())
    take_out(model, "default", flags)
    del model.peft_config
    model.train()
    assert_same(model, before)
    assert torch.is_tensor(model(torch.zeros(2, 3)))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_not_finished_is_put_back(error):
    model = nested()
    model.notes = ["one"]
    before, weight, names = snapshot(model), model.head.weight, list(model._modules)
    with pytest.raises(error), transaction(model, [weight]), torch.no_grad():
        weight.zero_().requires_grad_(False)
        model.head = nn.Tanh()
        model.extra = nn.Linear(1, 1)
        model.notes.append("two")
        model.eval()
        raise error
    assert_same(model, before)
    assert model.head.weight is weight and list(model._modules) == names and model.notes == ["one"]
    with transaction(model, [weight]):
        model.notes.append("two")
    assert model.notes == ["one", "two"]


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


def test_other_shapes_are_told_by_adapter(model):
    state = {f"prefix.{name}": tensor for name, tensor in model.state_dict().items()}
    assert mismatches(model, state, "prefix.") == ({}, {"default", "other"})
    state["prefix.body.0.lotra_core.other"] = torch.zeros(2, 2, 2)
    wrong, _ = mismatches(model, state, "prefix.")
    (line,) = wrong.pop("other")
    assert not wrong and "body.0.lotra_core: (2, 2, 2) in the checkpoint, (1, 1, 1) in the model" in line
    assert mismatches(model, {}, "prefix.") == ({}, set())


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
