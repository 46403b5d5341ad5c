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

"""The parameters that a base layer runs with on the universal path."""

from __future__ import annotations

import pytest
import torch
from stand_ins import FAMILIES
from torch import nn

from peft_lotra.families.registry import get_kan_spec
from peft_lotra.tucker import Tucker, Update
from peft_lotra.tuner.universal_path import add_updates, are_stored, run_base


def layer_and_updates(family, residual=True):
    torch.manual_seed(0)
    layer = FAMILIES[family](3, 4)
    tensor = get_kan_spec(layer).locate(layer)
    size = tensor.shape[2] + (residual and tensor.has_residual)
    make = lambda: Tucker(torch.randn(2, 2, 2), torch.randn(4, 2), torch.randn(3, 2), torch.randn(size, 2))  # noqa: E731
    return layer, tensor, [Update(0.5, make()), Update(-2.0, make())]


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_added_to_the_parameters(family):
    layer, tensor, updates = layer_and_updates(family)
    before = tensor.read(layer).detach().clone()
    parameters = add_updates(tensor, layer, updates)
    expected = before + sum(update.dense() for update in updates)
    torch.testing.assert_close(tensor.join([parameters[name] for name in tensor.parameters]), expected)
    assert torch.equal(tensor.read(layer), before)  # the layer is left as it was


@pytest.mark.parametrize("family", ["own", "pykan", "fast-kan"])
def test_parameters_that_no_update_reaches_are_left_out(family):
    layer, tensor, updates = layer_and_updates(family, residual=False)
    assert list(add_updates(tensor, layer, updates)) == [tensor.name]
    assert add_updates(tensor, layer, []) == {}


def test_an_update_keeps_its_digits_under_autocast():
    layer, tensor, updates = layer_and_updates("own")
    expected = add_updates(tensor, layer, updates)
    with torch.autocast("cpu", torch.bfloat16):
        parameters = add_updates(tensor, layer, updates)
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())


def test_a_parametrized_base_layer_is_refused():
    layer, tensor, updates = layer_and_updates("own")
    assert are_stored(layer, tensor.parameters)
    nn.utils.parametrize.register_parametrization(layer, "spline_weight", nn.Identity())
    assert not are_stored(layer, tensor.parameters) and are_stored(layer, ["base_weight"])
    with pytest.raises(RuntimeError, match="`spline_weight` of the base layer is sharded or parametrized"):
        add_updates(tensor, layer, updates)


def test_runs_with_other_parameters():
    layer, tensor, updates = layer_and_updates("own")
    x = torch.rand(5, 3)
    zero = {name: torch.zeros_like(value) for name, value in tensor.read_parameters(layer).items()}
    assert not run_base(layer, zero, (x,), {}).any()
    assert torch.equal(run_base(layer, {}, (x,), {}), layer(x))
