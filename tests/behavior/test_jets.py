# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of adapted networks in closed form."""

import pytest
import torch
from behaving import KINDS, adapted, add
from jet_helpers import assert_same, nested, network, points
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.functional import hessian as hessian_of_row

from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKAN, hessian, jet, laplacian


KIND = ["efficient-kan", "fast-kan", "cheby-kan"]
MODELS = {
    "network": network,
    "no residual": network,
    "slim": lambda: SlimKAN((3, 7, 6, 2), (4, 3, 3), dtype=torch.float64),
    "norm": lambda: KAN([3, 5, 2], norm="layer"),
    "transformers": lambda: KANModel(KANConfig(widths=(3, 5, 2))),
    **{kind: lambda kind=kind: nn.Sequential(KINDS[kind]().kan) for kind in KIND},
}


@pytest.mark.parametrize("rows", [2, 40])  # contracted factor by factor, and with the dense update
@pytest.mark.parametrize("kind", ["network", "no residual", "slim"])
def test_one_adapter_several_none_and_merged(rows, kind):
    base, x = MODELS[kind](), points(rows)
    of_base, model = jet(base, x), adapted(base, adapt_residual=kind != "no residual")
    add(model, "second", r=(3, 2, 2), alpha=0.7, target_modules=["layers.1"])
    one = jet(model, x)
    assert_same(one, nested(model, x))
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["network", "slim", "norm", "transformers", *KIND])
def test_second_derivatives(kind):
    model, x, v = adapted(MODELS[kind]()).double().eval(), points(7) / 2, torch.randn(2, 3, dtype=torch.float64)
    assert_same(jet(model, x), nested(model, x))
    assert_same(jet(model, x, v), nested(model, x, v))

    def function(x):
        y = model(x[None])
        return getattr(y, "logits", y)[0]

    rows = [
        [hessian_of_row(lambda x, o=o: function(x)[o], row) for o in range(jet(model, x)[0].shape[1])] for row in x
    ]
    second = torch.stack([torch.stack(row) for row in rows]).permute(2, 3, 0, 1)
    found = (hessian(model, x)[2], laplacian(model, x), jet(model, x, v, collapse=True)[2])
    expected = (second, second.diagonal().sum(-1), torch.einsum("di,dj,ijno->no", v, v, second))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["network", "slim", "efficient-kan"])
def test_gradients_of_the_adapter(kind):
    model, x = adapted(MODELS[kind]()).double(), points()
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
    saved = adapted(network(), target_modules=["layers.0"], modules_to_save=["layers.2"])
    with torch.no_grad():
        saved.base_model.model.layers[2].modules_to_save["default"].base_weight.mul_(2)
    assert_same(jet(saved, x), nested(saved, x))


def test_hooks_of_a_base_layer_are_not_passed_over():
    model, x = adapted(network()).train(), points(6)
    model.get_base_model().layers[1].base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(jet(model, x), nested(model, x))
