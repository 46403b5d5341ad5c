# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The description of a kind of layer in the file of an adapter."""

import copy
import json
import pickle

import pytest
import torch
from helpers import adapt, assert_equal, config_of, edit_config, inputs, refused
from peft import PeftModel
from stand_ins import as_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import KANLayerSpec, find_kan_layers, register_kan_layer
from peft_lotra.kan import KANLinear
from peft_lotra.layers import kinds
from peft_lotra.layers.kinds import spec_from_file
from peft_lotra.tuner.base_record import record_layer


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


def test_a_description_holds_no_functions_and_is_read_again():
    spec, layer = register_waves(), Waves()

    description = json.loads(json.dumps(spec.describe(layer)))
    read = spec_from_file("waves", description)

    assert description == {
        "coefficients": [["cosines", "o (i k)"], ["sines.*", "o i n"]],
        "residual": ["linear.weight", "o i"],
        "grid": ["width"],
        "grid_methods": ["widen"],
        "axes": {"k": 5},
        "bias": "linear.bias",
    }
    assert read.locate(layer) == spec.locate(layer)
    assert not read.matches(layer)
    assert read.basis is None
    for equal in (read, copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert equal.describe(layer) == description


def test_roles_are_described():
    roles = {"groups": "g", "edge_scale": ("b", "o i"), "network_methods": {"fit": None}, "checkpoint_methods": ("s",)}
    spec = KANLayerSpec("mine", nn.Module, ("a", "g o i k ..."), grid=("width",), **roles)

    read = spec_from_file("mine", spec.describe(nn.Module()))

    assert read.describe(nn.Module()).keys() == {"coefficients", "grid", *roles}
    assert read.describe(nn.Module()) == spec.describe(nn.Module())


def test_registered_kinds_are_described_and_those_of_the_package_are_not():
    def record():
        return record_layer(adapt(as_model(KANLinear(3, 4))).base_model.model.kan)

    assert "description" not in record()
    register_kan_layer("mine", matches=KANLinear, coefficients=("spline_weight", "o i k"))
    assert record()["description"] == {"coefficients": ["spline_weight", "o i k"]}


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of a kind that is no longer registered, inputs, and its outputs."""
    register_waves()
    model, x = adapt(net()), inputs()
    y = model(x).detach()
    model.save_pretrained(tmp_path)
    del kinds.REGISTERED["waves"]
    return tmp_path, x, y


def test_an_adapter_is_loaded_without_the_registration(saved):
    folder, x, y = saved
    expected = net()(x)

    model = PeftModel.from_pretrained(net(), folder)

    assert_close(model(x), y)
    rows = [(row.name, row.kind, row.shape) for row in find_kan_layers(model)]
    assert rows == [("0", "waves", (4, 3, 10)), ("2", "waves", (2, 4, 6))]
    with pytest.raises(RuntimeError, match="widen"):
        model.base_model.model[0].widen()
    with model.disable_adapter():
        assert_equal(model(x), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.merge_and_unload()):
        assert_close(copied(x), y)


def test_an_adapter_that_was_loaded_without_the_registration_is_saved_again(saved, tmp_path):
    folder, x, y = saved
    model = PeftModel.from_pretrained(net(), folder)
    again = tmp_path / "again"

    model.save_pretrained(again)
    model.load_adapter(again, "second")
    model.set_adapter("second")

    assert_close(model(x), y)
    records = [config_of(path)["base_layers"] for path in (folder, again)]
    assert records[0] == records[1]


def assert_refused(folder, base, words):
    with refused(words):
        PeftModel.from_pretrained(base, folder)


def test_another_grid_is_refused(saved):
    base = net()
    base[0].widen()

    assert_refused(saved[0], base, "The grid of 0 did not match the base")


def test_another_layer_is_refused(saved):
    base = net()
    base[0] = nn.Linear(3, 4)

    assert_refused(saved[0], base, "Linear was recognized as a KAN layer of the kind 'waves'")


def edit(folder, change):
    layers = config_of(folder)["base_layers"]
    for layer in layers.values():
        change(layer)
    edit_config(folder, base_layers=layers)


def test_without_a_description_the_missing_kind_is_named(saved):
    edit(saved[0], lambda layer: layer.pop("description"))
    assert_refused(saved[0], net(), "kind 'waves', which is neither registered nor described.*register_kan_layer")


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
    assert_refused(folder, base, "'waves' in the file is broken|kind 'waves'")
    assert [type(module) for module in base] == [Waves, nn.Tanh, Waves]
