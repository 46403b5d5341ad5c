# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Several adapters of one model."""

import pytest
import torch
from behaving import X, adapted, add, apart, layers, net

from peft_lotra import LoTRAConfig


@pytest.fixture
def model():
    model = adapted(alpha=2.0)
    add(model, "other")
    return model


def output(model, name):
    model.set_adapter(name)
    return model(X).detach()


def test_set_and_add_adapter(model):
    base, first, second = net()(X), output(model, "default"), output(model, "other")
    with model.disable_adapter():
        assert apart(model(X), base) < 1e-6
    assert min(apart(first, base), apart(second, base), apart(first, second)) > 1e-3
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")
    assert torch.equal(model(X), second) and torch.equal(output(model, "default"), first)
    model.add_adapter("new", LoTRAConfig(r=3))
    assert apart(output(model, "new"), base) < 1e-6
    with pytest.raises(ValueError, match="other"):
        model.add_adapter("other", LoTRAConfig())


def test_several_active_adapters_add_up(model):
    model.base_model.set_adapter(["default", "other"])
    for layer in layers(model).values():
        x = torch.rand(5, layer.in_features)
        both, base, parts = layer(x), layer.base_layer(x), 0
        for name in ("default", "other"):
            layer.set_adapter(name)
            parts = parts + layer(x) - base
        layer.set_adapter(["default", "other"])
        assert apart(both, base + parts) < 1e-5


@pytest.mark.parametrize("active", ["default", "other"])
def test_delete_adapter(model, active):
    first = output(model, "default")
    model.set_adapter(active)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and not any("other" in name for name in model.state_dict())
    assert model.active_adapters == ["default"] and torch.equal(model(X), first)
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")
