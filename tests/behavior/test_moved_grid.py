# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A grid that moves under an adapter is noticed."""

import copy

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart, layers, net, same, state

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


def test_refit_forgets_the_formula_of_the_former_grid():
    """The spline of a layer with uniform knots is computed by a formula, which others do not have."""
    x = torch.rand(300, 3) * 1.8 - 0.9
    model = adapted(KINDS["efficient-kan"]())
    model.train()
    model(x)
    refit_adapters(model, x, move=lambda base: base.kan.update_grid(x))
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    assert apart(merged(x), model.train()(x)) < 1e-5


def test_a_grid_that_moves_while_there_is_no_adapter():
    model = adapted(KINDS["efficient-kan"]())
    (layer,) = layers(model).values()
    model.delete_adapter("default")
    layer.base_layer.update_grid(X)
    add(model, "new")
    model.set_adapter("new")
    y = model(X)
    model.merge_adapter()
    assert apart(model(X), y) < 1e-5
