# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Scales of adapters, and rank and module dropout."""

import pytest
import torch
from helpers import adapt, assert_near, base, inputs, layer_of, lotra_layers
from torch.testing import assert_close

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


def update(model, x):
    """What the active adapters change."""
    with torch.no_grad(), model.disable_adapter():
        before = model(x)
    return model(x).detach() - before


def test_the_scale_multiplies_alpha():
    model = adapt(base("own", torch.float64), alpha=2.0)
    x = inputs(dtype=torch.float64)
    (layer,), full = lotra_layers(model).values(), update(model, x)
    for scale in (0.5, 0.0, 1.0):  # of alpha, not of the last scale
        layer.set_scale("default", scale)
        assert_close(update(model, x), scale * full, rtol=0, atol=1e-12)
    layer.set_scale("unknown", 7.0)

    assert_close(update(model, x), full, rtol=0, atol=1e-12)

    layer.set_scale("default", 0.25)
    y = model(x)

    assert_close(model.merge_and_unload()(x), y, rtol=0, atol=1e-12)


def test_only_the_active_adapters_are_scaled():
    model = adapt(base("own", torch.float64), alpha=2.0)
    model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    x, full = inputs(dtype=torch.float64), {}
    layer = layer_of(model)
    for name in ("second", "default"):
        model.set_adapter(name)
        full[name] = update(model, x)

    def check(name, scale):
        model.set_adapter(name)
        assert_close(update(model, x), scale * full[name], rtol=0, atol=1e-12)

    for call, factor in ((layer.scale_layer, 3.0), (layer.scale_layer, 0.5), (layer.unscale_layer, 0.5)):
        call(factor)
    check("default", 3)
    layer.unscale_layer()
    check("default", 1)
    layer.scale_layer(4.0)
    check("second", 1)
    check("default", 4)


@pytest.mark.parametrize("kind", ["own", "fast-kan", "inkan"])
@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
def test_a_merge_drops_nothing(kind, name):
    model, x = adapt(base(kind), **{name: 0.5}), inputs()
    y = model(x)
    model.train().merge_adapter()

    assert_near(model(x), y)  # merged with all components, whatever the mode


def draws(model, x, n):
    with torch.no_grad():
        return torch.stack([model.train()(x) for _ in range(n)])


def test_rank_dropout_keeps_the_expected_update():
    model = adapt(base("own"), r=(3, 2, 2), rank_dropout=0.25)
    x = inputs(2)
    change = update(model, x)
    results = draws(model, x, 1500)
    with model.disable_adapter():
        mean = (results - model(x)).mean(0)

    assert_near(mean, change, 0.1)
    # each of the three components is there or is not
    assert 2 < len(results.flatten(1).mul(1e4).round().unique(dim=0)) <= 2**3


def test_module_dropout_skips_the_whole_adapter_of_each_layer():
    model, x = adapt(base("own"), module_dropout=0.25), inputs(2)
    full = model(x)
    with model.disable_adapter():
        bare = model(x)
    results = draws(model, x, 400)
    is_full, is_bare = (torch.isclose(results, y, atol=1e-5).flatten(1).all(1) for y in (full, bare))

    assert (is_full ^ is_bare).all()
    assert 0.68 < is_full.float().mean() < 0.82

    both = adapt(KAN([3, 4, 2]), module_dropout=0.5)

    assert len(draws(both, x, 60).flatten(1).mul(1e4).round().unique(dim=0)) == 4
