# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import torch
from helpers import adapt, assert_same, lotra_layers, nested, snapshot
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.tuner.injection import prepare_targets, replace_module, take_out


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
