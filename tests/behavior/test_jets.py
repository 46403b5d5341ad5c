# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of adapted networks in closed form; `oracle/test_jets.py` has them of each kind."""

import pytest
import torch
from helpers import adapt, add_adapter
from jet_helpers import assert_same, nested, network, points
from peft import LoraConfig, get_peft_model

from peft_lotra import register_kan_layer
from peft_lotra.kan import jet


@pytest.mark.parametrize("rows", [2, 40])  # contracted factor by factor, and with the dense update
def test_several_adapters_none_and_merged(rows):
    base, x = network(), points(rows)
    of_base, model = jet(base, x), adapt(base)
    add_adapter(model, "second", r=(3, 2, 2), alpha=0.7, target_modules=["layers.1"])
    one = jet(model, x)

    with model.disable_adapter():
        assert_same(jet(model, x), of_base, 1e-14)
    model.base_model.set_adapter(["default", "second"])
    both = jet(model, x)

    assert_same(both, nested(model, x))
    assert not torch.allclose(one[2], both[2])

    model.merge_adapter()

    assert_same(jet(model, x), nested(model, x))
    assert_same(jet(model, x), both)

    with model.disable_adapter():
        assert_same(jet(model, x), of_base, 1e-12)


def test_lora_on_parameters_and_saved_modules():
    x = points()
    config = {"target_modules": [], "target_parameters": ["spline_weight", "base_weight"]}
    lora = get_peft_model(network(), LoraConfig(r=2, init_lora_weights=False, **config))

    assert_same(jet(lora, x), nested(lora, x))

    saved = adapt(network(), target_modules=["layers.0"], modules_to_save=["layers.2"])
    with torch.no_grad():
        saved.base_model.model.layers[2].modules_to_save["default"].base_weight.mul_(2)

    assert_same(jet(saved, x), nested(saved, x))


def test_lora_on_parameters_in_another_order():
    """A layer may call its coefficients as ours do, and keep the inputs first."""
    base = torch.nn.Sequential(InputsFirst(), InputsFirst()).double()
    coefficients = ("spline_weight", "i o k")
    register_kan_layer("inputs first", matches=InputsFirst, coefficients=coefficients, basis=InputsFirst.basis)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=["spline_weight"])
    model, x = get_peft_model(base, config), points()

    assert_same(jet(model, x), nested(model, x))


class InputsFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.spline_weight = torch.nn.Parameter(torch.randn(3, 3, 4))

    def basis(self, x):
        return torch.sin(x.unsqueeze(-1) * torch.arange(1, 5))

    def forward(self, x):
        return torch.einsum("nik,iok->no", self.basis(x), self.spline_weight)


def test_hooks_of_a_base_layer_are_not_passed_over():
    model, x = adapt(network()).train(), points(6)
    model.get_base_model().layers[1].base_layer.register_forward_hook(lambda module, args, output: 2 * output)

    assert_same(jet(model, x), nested(model, x))
