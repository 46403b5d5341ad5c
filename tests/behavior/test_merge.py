# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Merging changes where the update is, not what the model computes."""

import copy

import pytest
import torch
from helpers import (
    CONVS,
    KINDS,
    X,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    components,
    differ,
    layer_of,
    lotra_layers,
    nested,
    net,
    refused,
    snapshot,
    state,
)
from torch.nn.utils import prune
from torch.testing import assert_close

from peft_lotra.kan import KAN


def base_state(model):
    return {name: tensor for name, tensor in state(model).items() if "lotra_" not in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_base_bit_for_bit(kind, dtype):
    model = adapt(KINDS[kind]().to(dtype))
    add_adapter(model, "second")
    before = base_state(model)
    for names in (["default"], ["default", "second"], None):
        model.merge_adapter(names)
        assert differ(base_state(model), before)
        model.unmerge_adapter()
        assert_equal(base_state(model), before)


@pytest.mark.parametrize("kind", [*KINDS, *CONVS])
def test_merge_and_unload_leaves_no_trace(kind):
    model, x = (KINDS[kind](), X) if kind in KINDS else (CONVS[kind](), torch.rand(2, 2, 5, 5))
    kan, shown, before = model.kan, repr(model), snapshot(model)
    tuned = adapt(model, r=2)
    y = tuned(x)
    merged = tuned.merge_and_unload(safe_merge=True)

    assert merged is model
    assert merged.kan is kan
    assert repr(merged) == shown
    assert_near(merged(x), y)

    after = snapshot(model)

    assert list(after["state"]) == list(before["state"])
    assert all(after[key] == before[key] for key in ("types", "requires_grad"))
    assert after["methods"][1:] == before["methods"][1:]


def test_several_adapters_are_merged_at_once():
    model = adapt()
    add_adapter(model, "other")
    model.base_model.set_adapter(["default", "other"])
    before, y = base_state(model), model(X)
    model.merge_adapter()

    assert all(
        layer.merged and set(layer.merged_adapters) == {"default", "other"} for layer in lotra_layers(model).values()
    )
    assert_near(model(X), y)

    with model.disable_adapter():
        assert_equal(model(X), net()(X))

    assert_equal(base_state(model), before)
    assert_equal(model(X), y)

    model.set_adapter("other")
    y = model(X)
    model.set_adapter("default")

    assert_near(model.merge_and_unload(adapter_names=["other"])(X), y)


def test_merged_one_after_the_other_twice_and_with_another_scale():
    model = adapt(net().double())
    add_adapter(model, "second")
    before, y = base_state(model), model(X.double())
    model.merge_adapter(["default", "default"])

    assert_close(model(X.double()), y)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["default"])
    assert_close(model(X.double()), y)

    layer = next(iter(lotra_layers(model).values()))
    layer.set_scale("default", 7.0)  # what was merged is unmerged, not what the adapter would be now
    model.merge_adapter(["second"])

    assert layer.merged_adapters == ["default", "second"]

    model.unmerge_adapter()

    assert_equal(base_state(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_a_merged_model_is_used_trained_and_unloaded():
    base, x = net(), X.clone().requires_grad_()
    plain = base(x)
    model = adapt(base)
    before, y = base_state(model), model(x)
    with torch.inference_mode():
        model.merge_adapter()

    assert_near(model(x), y)

    model(x).sum().backward()

    assert x.grad is not None
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lotra_" not in n)
    with pytest.warns(UserWarning, match="Unmerging the model first|cannot be set when the model is merged"):
        add_adapter(model, "third")
        model.set_adapter("third")

    model.set_adapter("default")

    assert_equal(base_state(model), before)

    model.train()(x).square().sum().backward()

    assert all(p.grad.any() for name, p in components(model) if ".default" in name)

    model.eval().merge_adapter()
    unloaded = model.unload()

    assert_equal(unloaded(x), plain)
    assert not lotra_layers(unloaded)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_what_is_not_finite_is_refused(value, name):
    model = adapt(nested())
    add_adapter(model, "bad")
    with torch.no_grad():
        for component in model.base_model.model["tail"].layers[1].get_components("bad")._asdict().values():
            component.fill_(value)

    with refused("NaNs detected in the merged weights. The adapter bad seems to be broken", model):
        getattr(model, name)(adapter_names=["default", "bad"], safe_merge=True)
    assert not any(layer.merged for layer in lotra_layers(model).values())


def test_a_safe_merge_of_a_sum_that_is_not_finite_is_refused():
    model = adapt()
    add_adapter(model, "second")
    layer = next(iter(lotra_layers(model).values()))
    with torch.no_grad():
        for name in ("default", "second"):
            components = layer.get_components(name)._asdict().values()
            for component in components:
                component.zero_()
                component.view(-1)[0] = 2.5e38 ** (1 / len(components))

    with refused("NaNs detected"):
        model.merge_adapter(["default", "second"], safe_merge=True)
    assert not layer.merged


@pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload"])
def test_what_is_refused_changes_nothing(name):
    moved, computed, unknown = adapt(KAN([3, 4, 2])), adapt(KAN([3, 4, 2])), adapt(nested())
    moved.base_model.model.layers[1].base_layer.grid_bounds.mul_(2)
    prune.l1_unstructured(computed.base_model.model.layers[1].base_layer, "spline_weight", amount=0.3)
    cases = [(moved, None, "The grid of `layers.1` .* was moved")]
    cases += [(computed, None, "spline_weight.* is computed from other parameters")]
    cases += [(unknown, names, "list of strings|not found") for names in (["default", "nobody"], "default", [3])]
    for model, names, words in cases:
        with refused(words, model, error=(ValueError, RuntimeError)):
            getattr(model, name)(adapter_names=names)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "pykan"])
def test_what_is_not_finite_is_unmerged(kind, value):
    model = adapt(KINDS[kind]())
    before = base_state(model)
    for _, parameter in components(model):
        parameter.data.fill_(value)
    model.merge_adapter()

    assert differ(base_state(model), before)

    model.unmerge_adapter()

    assert_equal(base_state(model), before)


@pytest.mark.parametrize("kind", ["own", "pykan"])
def test_a_change_of_merged_parameters_stays_when_they_are_unmerged(kind):
    """As with LoRA, the updates are subtracted, at the scale at which they were merged."""
    model = adapt(KINDS[kind]().double(), r=1)
    add_adapter(model, "second")
    layer = layer_of(model)
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    model.merge_adapter(["default"])
    layer.set_scale("default", 7.0)
    for parameter in layer._base_parameters().values():
        parameter.data.mul_(1.5)
    layer.merge(adapter_names=["second"])
    coefficients = layer.get_base_weight()

    model.unmerge_adapter()

    assert_close(layer.get_base_weight(), coefficients - sum(deltas))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_of_a_merged_model_is_no_change(kind):
    model = adapt(KINDS[kind]())
    before = base_state(copy.deepcopy(model).half())
    model.merge_adapter()

    model.half().unmerge_adapter()

    assert_equal(base_state(model), before)
