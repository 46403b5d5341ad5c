# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapted layer computes what a layer computes whose coefficients have the dense update added."""

from __future__ import annotations

import copy

import pytest
import tensorly
import torch
from helpers import COMPONENTS, ROUNDING, adapt, base, components, inputs, lotra_layers, relative
from stand_ins import FAMILIES

from peft_lotra import LoTRALayer


every_family = pytest.mark.parametrize("family", FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def layer_of(model):
    (layer,) = lotra_layers(model).values()
    return layer


def dense_delta(layer, adapter="default"):
    tensorly.set_backend("pytorch")
    core, *factors = (part.detach() for part in layer.get_components(adapter))
    return layer.lotra_scaling[adapter] * tensorly.tucker_to_tensor((core, factors))


@every_family
@both_dtypes
@pytest.mark.parametrize("adapt_residual", [True, False])
def test_equals_the_dense_reference(family, dtype, adapt_residual):
    model = base(family, dtype)
    reference = copy.deepcopy(model)
    adapted = adapt(model, alpha=0.7, adapt_residual=adapt_residual)
    layer = layer_of(adapted)
    delta, basis = dense_delta(layer), layer.lotra_tensor.shape[2]
    assert delta.shape == (4, 3, basis + (adapt_residual and layer.lotra_tensor.has_residual))
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    with torch.no_grad():
        for name, part in layer.lotra_tensor.split(delta).items():
            reference.kan.get_parameter(name).add_(part)
    x = inputs(dtype=dtype)
    for training in (False, True):
        assert relative(adapted.train(training)(x), reference(x)) <= ROUNDING[dtype]
    y, expected = layer(x), reference.kan(x)
    assert type(y) is type(expected) and len(y) == len(expected)
    before, effective = layer.get_base_weight(), layer.effective_coefficients()
    assert torch.equal(effective[..., basis:], before[..., basis:]) or adapt_residual
    torch.testing.assert_close(effective[..., : delta.shape[-1]], (before[..., : delta.shape[-1]] + delta))


@pytest.mark.parametrize("family", ["own", "efficient-kan", "inkan", "cheby-kan"])
def test_gradients_are_those_of_the_dense_reference(family):
    model = base(family, torch.float64)
    adapted = adapt(copy.deepcopy(model))
    layer = layer_of(adapted)
    x = inputs(dtype=torch.float64).requires_grad_()
    adapted(x).sin().sum().backward()
    values = {
        name: part.detach().requires_grad_()
        for name, part in zip(COMPONENTS, layer.get_components("default"), strict=True)
    }
    core, out, in_, basis = values.values()
    delta = torch.einsum("abc,oa,ib,kc->oik", core, out, in_, basis)
    parts = layer.lotra_tensor.split(delta)
    weights = {f"kan.{name}": model.kan.get_parameter(name).detach() + part for name, part in parts.items()}
    x2 = x.detach().requires_grad_()
    torch.func.functional_call(model, weights, (x2,)).sin().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    for name, value in values.items():
        torch.testing.assert_close(getattr(layer, name)["default"].grad, value.grad)


def test_the_layer_itself():
    model = adapt(base("own"), r=(2, 3, 100), alpha=1.5, rank_dropout=0.25)
    layer = layer_of(model)
    assert isinstance(layer, LoTRALayer) and (layer.in_features, layer.out_features) == (3, 4)
    assert [tuple(part.shape) for part in layer.get_components("default")] == [(2, 3, 9), (4, 2), (3, 3), (9, 9)]
    assert [name for name, _ in components(layer)] == [f"{name}.default" for name in COMPONENTS]
    assert layer.lotra_r == {"default": (2, 3, 9)} and layer.lotra_alpha == {"default": 1.5}
    assert repr(layer).startswith("lotra.LoTRALayer") and type(layer.get_base_layer()).__name__ == "KANLinear"


@pytest.mark.parametrize("width", [8, 512])
def test_the_output_of_a_random_update_has_the_size_of_a_basis_function_at_any_width(width):
    energies = []
    for _ in range(20):
        model = adapt(base("own", torch.float64, width, 16), r=(8, 4, 6), adapt_residual=False)
        features = torch.randn(16, width, 8, dtype=torch.float64)
        output = torch.einsum("bik,oik->bo", features, layer_of(model).get_delta_weight("default"))
        energies.append(output.square().mean().item())
    assert 0.5 < sum(energies) / len(energies) / 8 < 1.8
