# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A grid that moves under an adapter is noticed."""

import pytest
import torch
from behaving import KINDS, X, adapted, apart, layers, net, same, state

from peft_lotra import refit_adapters


def test_a_buffer_is_assigned():
    model = adapted()
    y, layer = model(X), next(iter(layers(model).values())).base_layer
    before = layer.grid_bounds
    layer.grid_bounds = before * 1.5
    with pytest.raises(RuntimeError, match="grid"):
        model(X)
    layer.grid_bounds = before.clone()  # back, in other memory
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "network"])
def test_update_grid(kind):
    model = adapted(net() if kind == "network" else KINDS[kind]())
    kan = model.base_model.model.kan
    with pytest.raises((RuntimeError, AttributeError, TypeError), match="grid"):
        (kan if kind == "network" else kan.base_layer).update_grid(X / 2)
        model(X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_moves_no_grid(dtype):
    model = adapted()
    y, bound = model(X), 0.1 if dtype is torch.bfloat16 else 1e-6
    assert apart(model.to(dtype)(X.to(dtype)).float(), y) < bound and apart(model.float()(X), y) < bound


@pytest.mark.parametrize("kind", ["own", "efficient-kan"])
def test_refit_carries_over(kind):
    x = torch.rand(300, 3) * 1.8 - 0.9
    model = adapted(KINDS[kind](), r=3)
    y, before = model(x).detach(), state(model)
    report = refit_adapters(model, x, move=lambda base: base.kan.update_grid(x))
    assert list(report.errors) == [("kan", "default")] and report.errors["kan", "default"] < 0.1
    assert apart(model(x), y) < 0.1 and not same(state(model), before)
    after = state(model)
    assert not refit_adapters(model, x).errors and same(state(model), after)
