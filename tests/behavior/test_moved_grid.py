# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A grid that moves under an adapter is noticed."""

import copy

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart, layers

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


def test_update_grid_of_a_network():
    model = adapted()
    with pytest.raises(RuntimeError, match="grid"):
        model.base_model.model.kan.update_grid(X / 2)
        model(X)


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
