# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy

import pytest
import tensorly
import torch
from helpers import COMPONENTS, ROUNDING, adapt, base, components, inputs, lotra_layers, relative
from peft import LoraConfig, PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig, LoTRALayer
from peft_lotra.families.registry import get_kan_spec


every_family = pytest.mark.parametrize("family", FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def layer_of(model):
    (layer,) = lotra_layers(model).values()
    return layer


def add_dense(model, delta):
    """A copy of a model of one layer, with a canonical delta added to its stored coefficients."""
    model = copy.deepcopy(model)
    tensor = get_kan_spec(model.kan).locate(model.kan)
    with torch.no_grad():
        for name, part in tensor.split(delta).items():
            model.kan.get_parameter(name).add_(part)
    return model


def dense_delta(layer, adapter="default"):
    tensorly.set_backend("pytorch")
    core, *factors = (part.detach() for part in layer.get_components(adapter))
    return layer.lotra_scaling[adapter] * tensorly.tucker_to_tensor((core, factors))


################
# The function #
################


@every_family
@both_dtypes
def test_starts_equal_to_its_base(family, dtype):
    model = base(family, dtype)
    x = inputs(dtype=dtype)
    before = model(x)
    adapted = adapt(model, random=False)
    for training in (False, True):
        y = adapted.train(training)(x)
        assert y.dtype == before.dtype
        assert relative(y, before) <= (0.0 if dtype == torch.float64 else 1e-6)


@every_family
@both_dtypes
@pytest.mark.parametrize("adapt_residual", [True, False])
def test_equals_the_dense_reference(family, dtype, adapt_residual):
    model = base(family, dtype)
    reference = copy.deepcopy(model)
    adapted = adapt(model, alpha=0.7, adapt_residual=adapt_residual)
    layer = layer_of(adapted)
    delta = dense_delta(layer)
    has_slice = adapt_residual and layer.lotra_tensor.has_residual
    assert delta.shape == (4, 3, layer.lotra_tensor.shape[2] + has_slice)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    reference = add_dense(reference, delta)
    x = inputs(dtype=dtype)
    assert relative(adapted(x), reference(x)) <= ROUNDING[dtype]
    # in training, too, and with what the layer itself returns
    assert relative(adapted.train()(x), reference(x)) <= ROUNDING[dtype]
    y, expected = layer(x), reference.kan(x)
    assert type(y) is type(expected) and len(y) == len(expected)


@every_family
def test_without_the_residual_branch_its_weights_stay(family):
    model = base(family)
    tensor = get_kan_spec(model.kan).locate(model.kan)
    before = tensor.read(model.kan).clone()
    merged = adapt(model, adapt_residual=False).merge_and_unload()
    after, basis = tensor.read(merged.kan), tensor.shape[-1]
    assert torch.equal(after[..., basis:], before[..., basis:])
    assert not torch.equal(after[..., :basis], before[..., :basis])


@every_family
def test_training(family):
    model = base(family)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, random=False).train()
    started = {name: parameter.clone() for name, parameter in components(adapted)}
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == set(started)
    x, y = inputs(32), torch.randn(32, 4)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(50):
        loss = (adapted(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert len(started) == 4
    for name, parameter in components(adapted):
        assert (parameter != started[name]).all(), name
    for name, tensor in adapted.unload().state_dict().items():
        assert torch.equal(tensor, frozen[name]), name


@pytest.mark.parametrize("family", ["own", "efficient-kan", "inkan", "cheby-kan"])
def test_gradients_are_those_of_the_dense_reference(family):
    model = base(family, torch.float64)
    reference = copy.deepcopy(model).requires_grad_(False)
    adapted = adapt(model)
    layer = layer_of(adapted)
    x = inputs(dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(adapted(x).sin().sum(), x, retain_graph=True)
    adapted(x).sin().sum().backward()
    merged = add_dense(reference, dense_delta(layer))
    torch.testing.assert_close(gradient, torch.autograd.grad(merged(x).sin().sum(), x)[0])
    # d/d core by finite differences along one direction
    direction, step = torch.randn_like(layer.lotra_core["default"]), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.lotra_core["default"].add_(sign * step * direction)
            values.append(add_dense(reference, dense_delta(layer))(x).sin().sum())
            layer.lotra_core["default"].sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((layer.lotra_core["default"].grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


######################
# Saving and loading #
######################


@every_family
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@both_dtypes
def test_saved_and_loaded_into_a_fresh_base(family, low_cpu_mem_usage, dtype, tmp_path):
    model = base(family, dtype)
    fresh = base(family, dtype)
    fresh.load_state_dict(model.state_dict())
    adapted = adapt(model)
    adapted.save_pretrained(tmp_path)
    x = inputs(dtype=dtype)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert (loaded(x) - adapted(x)).abs().max() == 0
    assert not any(p.requires_grad for p in loaded.parameters())
    for (name, saved), (loaded_name, parameter) in zip(components(adapted), components(loaded), strict=True):
        assert name == loaded_name and torch.equal(saved, parameter) and saved.dtype == parameter.dtype


def test_low_cpu_mem_usage_leaves_the_components_on_the_meta_device():
    config = LoTRAConfig(r=2)
    model = get_peft_model(base("own"), config, low_cpu_mem_usage=True)
    assert all(parameter.is_meta for _, parameter in components(model))


def test_what_low_cpu_mem_usage_made_is_not_loaded_without_it(tmp_path):
    adapted = adapt(base("own"))
    adapted.save_pretrained(tmp_path)
    own = copy.deepcopy(adapted).unload()
    model = get_peft_model(own, LoTRAConfig(r=adapted.peft_config["default"].r), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"(?s)on the meta device.* are loaded with it"):
        model.load_adapter(tmp_path, "default")
    assert all(parameter.is_meta for _, parameter in components(model))
    model.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    x = inputs()
    assert torch.equal(model(x), adapted(x))


###########
# Merging #
###########


@every_family
@both_dtypes
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(family, dtype, safe_merge):
    model = base(family, dtype)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, alpha=0.5)
    x = inputs(dtype=dtype)
    y = adapted(x)
    adapted.merge_adapter(safe_merge=safe_merge)
    merged = {name: tensor.clone() for name, tensor in as_model(layer_of(adapted).base_layer).state_dict().items()}
    assert layer_of(adapted).merged and layer_of(adapted).merged_adapters == ["default"]
    assert relative(adapted(x), y) <= ROUNDING[dtype]
    with pytest.warns(UserWarning, match="already merged"):
        adapted.merge_adapter()
    assert relative(adapted(x), y) <= ROUNDING[dtype]
    adapted.unmerge_adapter()
    assert not layer_of(adapted).merged and layer_of(adapted).merged_adapters == []
    assert relative(adapted(x), y) <= ROUNDING[dtype]
    for name, tensor in adapted.unload().state_dict().items():
        size = max(stored[name].abs().max(), merged[name].abs().max())
        assert (tensor - stored[name]).abs().max() <= ROUNDING[dtype] * size, name


@every_family
@both_dtypes
def test_merge_and_unload_leaves_no_trace(family, dtype):
    model = base(family, dtype)
    kan, keys, shown = model.kan, list(model.state_dict()), repr(model)
    trainable = [(name, p.requires_grad) for name, p in model.named_parameters()]
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    adapted = adapt(model)
    x = inputs(dtype=dtype)
    y = adapted(x)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert merged is model and merged.kan is kan and list(merged.state_dict()) == keys and repr(merged) == shown
    assert [(name, p.requires_grad) for name, p in merged.named_parameters()] == trainable
    assert [(name, sorted(vars(module))) for name, module in merged.named_modules() if name] == attributes[1:]
    assert not any("lotra" in name or "base_layer" in name for name, _ in merged.named_modules())
    assert relative(merged(x), y) <= ROUNDING[dtype]


@every_family
def test_unload_gives_the_base_back(family):
    model = base(family)
    x, kan = inputs(), model.kan
    before = model(x)
    unloaded = adapt(model).unload()
    assert unloaded is model and model.kan is kan and torch.equal(model(x), before)


def test_unmerge_of_what_is_not_merged_warns():
    layer = layer_of(adapt(base("own")))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@every_family
def test_get_and_set_base_weight(family):
    model = base(family)
    before = get_kan_spec(model.kan).locate(model.kan).read(model.kan).clone()
    adapted = adapt(model)
    layer = layer_of(adapted)
    assert torch.equal(layer.get_base_weight(), before) and not layer.get_base_weight().requires_grad
    layer.set_base_weight(2 * before)
    assert torch.equal(layer.get_base_weight(), 2 * before)


def test_the_layer_itself():
    model = adapt(base("own"), r=(2, 3, 100), alpha=1.5, rank_dropout=0.25)
    layer = layer_of(model)
    assert isinstance(layer, LoTRALayer) and (layer.in_features, layer.out_features) == (3, 4)
    assert [tuple(part.shape) for part in layer.get_components("default")] == [(2, 3, 9), (4, 2), (3, 3), (9, 9)]
    assert [name for name, _ in layer.named_parameters() if "lotra" in name] == [f"{n}.default" for n in COMPONENTS]
    assert layer.lotra_r == {"default": (2, 3, 9)} and layer.lotra_alpha == {"default": 1.5}
    assert repr(layer).startswith("lotra.LoTRALayer")
    assert type(layer.get_base_layer()).__name__ == "KANLinear"


def test_around_a_layer_of_another_method():
    """Another method's adapter elsewhere in the model is left alone."""
    model = nn.Sequential(FAMILIES["own"](3, 4), nn.Linear(4, 2))
    inner = get_peft_model(model, LoraConfig(target_modules=["1"], init_lora_weights=False)).base_model.model
    x = inputs()
    before = inner(x)
    adapted = adapt(inner, random=False)
    assert torch.equal(adapted(x), before)
    assert [name for name, _ in components(adapted)][0] == "base_model.model.0.lotra_core.default"
