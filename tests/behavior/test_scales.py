# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Scales of adapters."""

import torch
from helpers import adapt, base, inputs, layer_of, lotra_layers
from torch.testing import assert_close

from peft_lotra import LoTRAConfig


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
