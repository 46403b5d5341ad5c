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


def test_cat_is_exact_and_linear_of_one_adapter(model):
    errors = model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "sum")
    assert set(errors) == {"kan.layers.0", "kan.layers.1"} and max(errors.values()) < 1e-5
    for layer in layers(model).values():
        expected = 0.7 * layer.get_delta_weight("default") - 0.3 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["default"], [2.0], "twice", "linear")
    for layer in layers(model).values():
        torch.testing.assert_close(layer.get_delta_weight("twice"), 2 * layer.get_delta_weight("default"))


def test_svd_has_the_ranks_that_are_asked_for(model):
    errors = model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "small", "svd", ranks=(1, 2, 2))
    for layer, error in zip(layers(model).values(), errors.values(), strict=True):
        assert layer.lotra_r["small"] == (1, 2, 2) and 0 < error < 1
        total = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        assert abs((layer.get_delta_weight("small") - total).norm() / total.norm() - error) < 1e-4


SUMS = [("nobody", 1.0, ["sum"]), ("other", 1.0, ["other"]), ("other", float("nan"), ["sum"])]


@pytest.mark.parametrize(("other", "weight", "more"), [*SUMS, ("other", 1.0, ["sum", "linear"])])
def test_no_sum(model, other, weight, more):
    with pytest.raises(ValueError):
        model.add_weighted_adapter(["default", other], [1.0, weight], *more)
    assert set(model.peft_config) == {"default", "other"}


def test_scales(model):
    layer = next(iter(layers(model).values()))
    x, base = torch.rand(5, 3), layer.get_base_layer()
    update = layer(x) - base(x)
    layer.set_scale("default", 2.0)
    assert layer.lotra_scaling["default"] == 4 and apart(layer(x) - base(x), 2 * update) < 1e-5
    layer.scale_layer(0.25)
    assert layer.lotra_scaling["default"] == 1
    layer.unscale_layer()
    assert layer.lotra_scaling["default"] == 2 and torch.equal(layer(x) - base(x), update)


@pytest.mark.parametrize("name", ["a.b", "__base__"])
def test_a_sum_without_a_possible_name(model, name):
    before = list(model.peft_config)
    with pytest.raises((ValueError, KeyError), match=name):
        model.base_model.add_weighted_adapter(["default"], [1.0], name)
    assert list(model.peft_config) == before
