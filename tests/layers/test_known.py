# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The known kinds of layers: recognized, and read as their formula says."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapt, base, inputs, nested
from peft import LoraConfig, PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import find_kan_layers
from peft_lotra.kan import KANLinear
from peft_lotra.layers import registry
from peft_lotra.layers.registry import FoundKANLayer, get_kan_spec


# family, size of the basis, has a residual branch; for layers of 3 inputs and 4 outputs
EXPECTED = {
    "own": ("peft-lotra", 8, True),
    "efficient-kan": ("efficient-kan", 8, True),
    "efficient-kan-no-scaler": ("efficient-kan", 8, True),
    "efficient-kan-old": ("efficient-kan", 8, True),
    "pykan": ("pykan", 8, True),
    "fast-kan": ("fast-kan", 8, True),
    "faster-kan": ("fast-kan", 8, False),
    "cheby-kan": ("cheby-kan", 5, False),
    "fourier-kan": ("fourier-kan", 8, False),
    "physicsnemo": ("physicsnemo", 10, False),
    "flashkan": ("flashkan", 8, True),
    "inkan": ("inkan", 8, True),
    "kanx": ("kanx", 8, True),
    "pina": ("pina", 7, True),
}


def located(layer):
    return get_kan_spec(layer).locate(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_is_recognized(family):
    """With copies, casts, on the meta device, and of one input and output."""
    name, basis, residual = EXPECTED[family]
    layer = FAMILIES[family](3, 4)
    for other in (layer, copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).to("meta")):
        assert find_kan_layers(as_model(other)) == [FoundKANLayer("kan", name, (4, 3, basis), residual)]
    assert located(FAMILIES[family](1, 1)).shape == (1, 1, basis)


def test_a_surface_of_two_inputs_is_no_kan_layer():
    from inkan import KANLayer

    assert get_kan_spec(KANLayer(2, 3, dim=2, compile_basis=False)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_additive_in_the_canonical_tensor(family):
    """Edge (o, i) touches output o and input i alone, and each slice adds up: what the canonical order promises."""
    model = base(family, torch.float64)
    layer = model.kan
    tensor = located(layer)
    x = inputs(dtype=torch.float64)
    if family in ("fast-kan", "faster-kan"):
        layer.layernorm = None if family == "fast-kan" else nn.Identity()  # it mixes the inputs
    before = model(x)
    delta = torch.zeros_like(tensor.read(layer))
    delta[2, 1] = torch.randn(delta.shape[-1], dtype=torch.float64)
    with torch.no_grad():
        for name, part in tensor.split(delta).items():
            layer.get_parameter(name).add_(part)
    change = model(x) - before
    assert change[:, [0, 1, 3]].abs().max() < 1e-12 and change[:, 2].abs().min() > 1e-6
    moved = x.clone()
    moved[:, [0, 2]] = inputs(dtype=torch.float64)[:, [0, 2]]
    after = model(moved)
    with torch.no_grad():
        for name, part in tensor.split(delta).items():
            layer.get_parameter(name).sub_(part)
    torch.testing.assert_close(after - model(moved), change, rtol=0, atol=1e-12)


def test_an_adapted_layer_of_inkan_is_one_graph():
    model, x = adapt(base("inkan")), inputs()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("scaler", [True, False])
def test_qkan_fourier(scaler):
    from qkan.fourier_kan import FourierKANLinear

    model = as_model(FourierKANLinear(3, 4, enable_standalone_scale_fourier=scaler)).double()
    assert find_kan_layers(model) == [FoundKANLayer("kan", "qkan-fourier", (4, 3, 10), True)]
    x = inputs(dtype=torch.float64)
    adapted = adapt(model)
    y = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=0, atol=1e-12)


def names(model):
    return [layer.name for layer in find_kan_layers(model)]


def test_finds_each_layer_once_in_the_order_of_the_modules():
    layer, outer = KANLinear(3, 3), FAMILIES["own"](3, 4)
    outer.inner = KANLinear(3, 4)
    assert names(nested()) == ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]
    assert names(layer) == [""] and names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0"]
    assert names(as_model(outer)) == ["kan"]  # nothing inside a layer


def test_finds_the_layers_of_an_adapted_model():
    model = nested()
    before = find_kan_layers(model)
    get_peft_model(model, LoraConfig(target_modules=["head"]))
    adapted = adapt(model, target_modules=["body.1", "tail.layers.0"])
    assert find_kan_layers(model) == before == find_kan_layers(adapted.merge_and_unload())


@pytest.mark.parametrize("place", ["body.0", "tail"])
def test_does_not_find_copies_that_are_trained_whole(place):
    model = nested()
    before = names(model)
    adapt(model, target_modules=["body.1"], modules_to_save=[place])
    assert names(model) == [name for name in before if place not in name]


def test_few_functions_have_their_factors_adapted_and_older_files_load(tmp_path, monkeypatch):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(FAMILIES["efficient-kan"](3, 4, grid_size=2, spline_order=1), nn.Linear(4, 2))

    x = inputs()
    with monkeypatch.context() as before:
        before.delitem(registry.REGISTERED, "efficient-kan-few")  # as an older version knew it
        older = adapt(build())
        y = older(x)
        older.save_pretrained(tmp_path)
    assert get_kan_spec(build()[0]).family == "efficient-kan-few"
    torch.testing.assert_close(PeftModel.from_pretrained(build(), tmp_path).eval()(x), y)
    merged = adapt(build()).merge_and_unload()
    for name in ("spline_weight", "spline_scaler", "base_weight"):
        assert not torch.equal(merged[0].get_parameter(name), build()[0].get_parameter(name))
