# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The description of a kind of layer in a file, and adapters that are loaded by it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from helpers import adapt, inputs
from peft import PeftModel
from torch import nn

from peft_lotra import KANLayerSpec, find_kan_layers, register_kan_layer
from peft_lotra.kan import KANLinear
from peft_lotra.layers import registry
from peft_lotra.layers.description import spec_from_file
from peft_lotra.layers.registry import get_kan_spec, record_kind


class Waves(nn.Module):
    """y[o] = sum_{i,k} (A[o,i,k] cos(k x[i]) + B[o,i,k] sin(k x[i])) + W x, with a bias; x is in units of `width`."""

    def __init__(self, in_features=3, out_features=4, size=5):
        super().__init__()
        self.cosines = nn.Parameter(torch.randn(out_features, in_features * size))
        self.sines = nn.ParameterList([torch.randn(out_features, in_features, size)])
        self.linear = nn.Linear(in_features, out_features)
        self.size = size
        self.register_buffer("width", torch.tensor(2.0))

    def phases(self, x):
        return x[..., None] / self.width * torch.arange(self.size)

    def forward(self, x):
        y = self.phases(x).cos().flatten(1) @ self.cosines.T + self.linear(x)
        return y + torch.einsum("bik,oik->bo", self.phases(x).sin(), self.sines[0])

    def widen(self):
        self.width.mul_(2)


def register_waves():
    return register_kan_layer(
        "waves",
        matches=Waves,
        coefficients=[("cosines", "o (i k)"), ("sines.*", "o i n")],
        residual=("linear.weight", "o i"),
        grid=("width",),
        grid_methods=("widen",),
        axes=lambda m: {"k": m.size},
        bias="linear.bias",
        basis=lambda m, x: torch.cat([m.phases(x).cos(), m.phases(x).sin()], -1),
        activation=lambda m, x: x,
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(Waves(), nn.Tanh(), Waves(4, 2, size=3))


def test_a_description_holds_no_functions_and_comes_back():
    spec, layer = register_waves(), Waves()
    description = json.loads(json.dumps(spec.describe(layer)))
    assert description == {
        "coefficients": [["cosines", "o (i k)"], ["sines.*", "o i n"]],
        "residual": ["linear.weight", "o i"],
        "grid": ["width"],
        "grid_methods": ["widen"],
        "axes": {"k": 5},
        "bias": "linear.bias",
    }
    read = spec_from_file("waves", description)
    assert read.locate(layer) == spec.locate(layer) and read.describe(layer) == description
    assert not read.matches(layer) and read.basis is None
    assert spec_from_file("waves", {**description, "linear": False}).describe(layer) == description  # of older files
    for other in (copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert other.describe(layer) == description


def test_roles_are_described():
    roles = {"groups": "g", "edge_scale": ("b", "o i"), "network_methods": {"fit": None}, "checkpoint_methods": ("s",)}
    spec = KANLayerSpec("mine", nn.Module, ("a", "g o i k ..."), grid=("width",), **roles)
    read = spec_from_file("mine", spec.describe(nn.Module()))
    assert {name: getattr(read, name) for name in roles} == roles and read.coefficients == spec.coefficients
    assert read.grid == spec.grid == ("width",)


def test_kinds_that_come_with_the_package_are_not_described():
    layer = KANLinear(3, 4)
    assert record_kind(get_kan_spec(layer), layer) == {}
    spec = register_kan_layer("mine", matches=KANLinear, coefficients=("spline_weight", "o i k"))
    assert record_kind(spec, layer) == {"description": {"coefficients": ["spline_weight", "o i k"]}}


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of a registered kind, whose registration is gone, and the outputs with it."""
    register_waves()
    model = adapt(net())
    x = inputs()
    y = model(x).detach()
    model.save_pretrained(tmp_path)
    del registry.REGISTERED["waves"]
    return tmp_path, x, y


def test_an_adapter_is_loaded_without_the_registration_and_saved_again(saved, tmp_path):
    folder, x, y = saved
    base = net()
    before = base(x)
    model = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(model(x), y)
    assert [(found.name, found.family, found.shape) for found in find_kan_layers(model)] == [
        ("0", "waves", (4, 3, 10)),
        ("2", "waves", (2, 4, 6)),
    ]
    with pytest.raises(RuntimeError, match="widen"):
        model.base_model.model[0].widen()
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.save_pretrained(tmp_path / "again")
    model.load_adapter(tmp_path / "again", "second")
    model.set_adapter("second")
    first, second = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first["base_layers"] == second["base_layers"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.merge_and_unload()):
        torch.testing.assert_close(other(x), y)


def refused(folder, base, words):
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(base, folder)


def test_another_base_is_refused(saved):
    folder, *_ = saved
    base = net()
    base[0].widen()
    refused(folder, base, "The grid of 0 did not match the base")
    base[0] = nn.Linear(3, 4)
    refused(folder, base, "Linear was recognized as a KAN layer of the kind 'waves'")


def edit(folder, change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for layer in config["base_layers"].values():
        change(layer)
    path.write_text(json.dumps(config))


def test_without_a_description_the_missing_kind_is_named(saved):
    edit(saved[0], lambda layer: layer.pop("description"))
    refused(saved[0], net(), "kind 'waves', which its file does not describe.*register_kan_layer")


DAMAGED = [
    None,
    {},
    {"coefficients": "cosines"},
    {"coefficients": ["cosines"]},
    {"coefficients": ["cosines", "o (i k"]},
    {"coefficients": ["__class__.__init__", "o i k"]},
    {"coefficients": [["a", "o i k"]] * 2},
    {"coefficients": ["a", 3]},
    {"coefficients": ["a", "o i k"], "groups": 3},
]


@pytest.mark.parametrize("description", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_description_is_refused_before_the_model_is_touched(saved, description):
    folder, *_ = saved
    edit(folder, lambda layer: layer.update(description=description))
    base = net()
    refused(folder, base, "'waves' in the file is broken|kind 'waves'")
    assert [type(module) for module in base] == [Waves, nn.Tanh, Waves]
