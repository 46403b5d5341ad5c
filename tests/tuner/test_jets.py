# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of networks that PEFT changed."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt
from jet_helpers import assert_same, nested, network, points
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import SlimKAN, jet


def check_adapters(model: nn.Module, x: Tensor, of_base: tuple) -> tuple:
    """One adapter, none, and two; returns the jet of the two, which stay in force."""
    model.add_adapter("second", LoTRAConfig(r=(3, 2, 2), init_weights=False, alpha=0.7, target_modules=["layers.1"]))
    one = jet(model, x)
    assert_same(one, nested(model, x))
    with model.disable_adapter():
        assert_same(jet(model, x), of_base, 1e-14)
    model.base_model.set_adapter(["default", "second"])
    both = jet(model, x)
    assert_same(both, nested(model, x))
    assert not torch.allclose(one[2], both[2])
    return both


@pytest.mark.parametrize("rows", [2, 40])  # contracted factor by factor, and with the dense update
@pytest.mark.parametrize("adapt_residual", [True, False])
def test_adapted(rows, adapt_residual):
    base, x = network(), points(rows)
    of_base = jet(base, x)
    model = adapt(base, adapt_residual=adapt_residual)
    both = check_adapters(model, x, of_base)
    model.merge_adapter()
    assert_same(jet(model, x), both, 1e-12)
    with model.disable_adapter():
        assert_same(jet(model, x), of_base, 1e-12)


@pytest.mark.parametrize("rows", [2, 40])
def test_slim_adapted(rows):
    base, x = SlimKAN((3, 7, 6, 2), (4, 3, 3), dtype=torch.float64), points(rows)
    of_base = jet(base, x)
    model = adapt(base)
    both = check_adapters(model, x, of_base)
    model.merge_adapter()
    assert_same(jet(model, x), nested(model, x))
    assert_same(jet(model, x), both)
    with model.disable_adapter():
        assert_same(jet(model, x), of_base, 1e-12)


def test_gradients_of_adapters(rows=40):
    model, x = adapt(network()), points(rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(sum(part.square().sum() for part in parts), parameters)
        for parts in (jet(model, x), nested(model, x))
    ]
    for a, e in zip(*gradients, strict=True):
        assert (a - e).abs().max() <= 1e-10 * e.abs().max()


def test_lora_on_parameters_and_saved_modules():
    x = points()
    config = {"target_modules": [], "target_parameters": ["spline_weight", "base_weight"]}
    lora = get_peft_model(network(), LoraConfig(r=2, init_lora_weights=False, **config))
    assert_same(jet(lora, x), nested(lora, x))
    saved = adapt(network(), target_modules=["layers.0"], modules_to_save=["layers.2"])
    with torch.no_grad():
        saved.base_model.model.layers[2].modules_to_save["default"].base_weight.mul_(2)
    assert_same(jet(saved, x), nested(saved, x))


def test_hooks_of_a_base_layer_are_not_passed_over():
    model, x = adapt(network()).train(), points(6)
    model.get_base_model().layers[1].base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(jet(model, x), nested(model, x))
