# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Merging changes where the update is, not what the model computes."""

import pytest
import torch
from behaving import CONVS, KINDS, X, adapted, add, apart, layers, net, same, state


def base_state(model):
    return {name: tensor for name, tensor in state(model).items() if "lotra_" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_the_base_back(dtype):
    model, x = adapted(net().to(dtype)), X.to(dtype)
    before, y = base_state(model), model(x)
    weights = [layer.get_base_weight() + layer.get_delta_weight("default") for layer in layers(model).values()]
    weights = [weight.to(dtype) for weight in weights]
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close([layer.get_base_weight() for layer in layers(model).values()], weights)
        assert apart(model(x), y) < (0.1 if dtype is torch.bfloat16 else 1e-5) and not same(base_state(model), before)
        model.unmerge_adapter()
        assert same(base_state(model), before) and torch.equal(model(x), y)


@pytest.mark.parametrize("kind", [*KINDS, *CONVS])
def test_merge_and_unload(kind):
    base, x = (KINDS[kind](), X) if kind in KINDS else (CONVS[kind](), torch.rand(2, 2, 5, 5))
    classes, names = [type(module) for module in base.modules()], list(base.state_dict())
    model = adapted(base, r=2)
    y = model(x)
    merged = model.merge_and_unload(safe_merge=kind == "own")
    assert [type(module) for module in merged.modules()] == classes and list(merged.state_dict()) == names
    assert apart(merged(x), y) < 1e-4


def test_several_adapters():
    model = adapted()
    add(model, "other")
    model.base_model.set_adapter(["default", "other"])
    before, y = base_state(model), model(X)
    model.merge_adapter()
    assert all(layer.merged and set(layer.merged_adapters) == {"default", "other"} for layer in layers(model).values())
    assert apart(model(X), y) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))
    assert same(base_state(model), before) and torch.equal(model(X), y)
    model.set_adapter("other")
    y = model(X)
    model.set_adapter("default")
    assert apart(model.merge_and_unload(adapter_names=["other"])(X), y) < 1e-5


@pytest.mark.parametrize("unload", [True, False])
def test_a_safe_merge_refuses_nan(unload):
    model = adapted()
    with torch.no_grad():
        list(layers(model).values())[1].lotra_core["default"].fill_(torch.nan)
    before = base_state(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        (model.merge_and_unload if unload else model.merge_adapter)(safe_merge=True)
    assert same(base_state(model), before) and not any(layer.merged for layer in layers(model).values())
