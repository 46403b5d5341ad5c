# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Merging: cycles, copies of the base, mistakes, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, assert_same, base, components, inputs, lotra_layers, nested, relative, snapshot
from stand_ins import FAMILIES
from torch.nn.utils import prune

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


def base_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lotra_" not in name}


def assert_base(model, state):
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_base_bit_for_bit(family, dtype):
    model = adapt(base(family, dtype))
    model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    state = base_state(model)
    for names in (["default"], ["default", "second"], None):
        model.merge_adapter(names)
        assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        model.unmerge_adapter()
        assert_base(model, state)


def test_merged_one_after_the_other_twice_and_with_another_scale():
    model, x = adapt(base("own", torch.float64)), inputs(dtype=torch.float64)
    model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    state, y = base_state(model), model(x)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(model(x), y)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), y)
    (layer,) = lotra_layers(model).values()
    layer.set_scale("default", 7.0)  # what was merged is unmerged, not what the adapter would be now
    model.merge_adapter(["second"])
    assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert_base(model, state)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_used_while_merged(tmp_path):
    model, x = adapt(KAN([3, 4, 2])), inputs().requires_grad_()
    state, y = base_state(model), model(x)
    with torch.inference_mode():
        model.merge_adapter()
    assert relative(model(x), y) < 1e-5
    model(x).sum().backward()
    assert x.grad is not None and not any(p.requires_grad for n, p in model.named_parameters() if "lotra_" not in n)
    with pytest.warns(UserWarning, match="Unmerging the model first|cannot be set when the model is merged"):
        model.add_adapter("third", LoTRAConfig(r=2))
        model.set_adapter("third")
    model.set_adapter("default")
    assert_base(model, state)
    model.train()(x).square().sum().backward()
    assert all(p.grad.any() for name, p in components(model) if ".default" in name)
    model.eval().merge_adapter()
    assert torch.equal(model.unload()(x), KAN.forward(model.get_base_model(), x))
    assert not lotra_layers(model)


def test_unloaded_while_merged():
    network, x = KAN([3, 4, 2]), inputs()
    y = network(x)
    model = adapt(network)
    model.merge_adapter()
    torch.testing.assert_close(model.unload()(x), y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_what_is_not_finite(value, name):
    model = adapt(nested(), adapter_name="good")
    model.add_adapter("bad", LoTRAConfig(r=2, init_weights=False))
    with torch.no_grad():
        for part in model.base_model.model["tail"].layers[1].get_components("bad"):
            part.fill_(value)
    state, types = base_state(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter bad seems to be broken"):
        getattr(model, name)(adapter_names=["good", "bad"], safe_merge=True)
    assert_base(model, state)
    assert [type(module) for module in model.modules()] == types
    assert not any(layer.merged for layer in lotra_layers(model).values())


def test_two_adapters_whose_sum_is_not_finite():
    model = adapt(base("own"), adapter_name="first")
    model.add_adapter("second", LoTRAConfig(init_weights=False))
    (layer,) = lotra_layers(model).values()
    with torch.no_grad():
        for name in ("first", "second"):
            for part in layer.get_components(name):
                part.zero_()
                part.view(-1)[0] = (2.5e38) ** 0.25
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["first", "second"], safe_merge=True)
    assert not layer.merged


def test_a_grid_that_moved_is_found_before_the_first_merge():
    model = adapt(KAN([3, 4, 2]))
    bounds = model.base_model.model.layers[1].base_layer.grid_bounds
    bounds.mul_(2)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="The grid of `layers.1` .* was moved"):
            merge()
    assert_same(model, before)


def test_parameters_that_are_computed_later():
    model = adapt(KAN([3, 4, 2]))
    prune.l1_unstructured(model.base_model.model.layers[1].base_layer, "spline_weight", amount=0.3)
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="spline_weight.* is computed from other parameters"):
            merge()
    assert_same(model, before)


@pytest.mark.parametrize("names", [["nobody"], ["default", "nobody"], "default", [3]])
@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
def test_unknown_names(names, name):
    model = adapt(nested())
    before = snapshot(model)
    with pytest.raises(ValueError, match="not found|a list of strings"):
        getattr(model, name)(adapter_names=names)
    assert_same(model, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan"])
def test_gradients_that_are_not_finite_reach_the_adapter_alone(family, value, tmp_path):
    model, x = adapt(base(family), random=False), inputs()
    state = base_state(model)
    with model.disable_adapter():
        y = model(x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model.train()(x) * value).sum().backward()
    optimizer.step()
    assert not all(parameter.isfinite().all() for _, parameter in components(model))
    with model.eval().disable_adapter():
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="not finite"):
        model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_base(model, state)
    assert torch.equal(model.unload()(x), y)
