# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A grid that moves under an adapter is noticed."""

import copy

import pytest
from helpers import (
    X,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    base,
    inputs,
    layer_of,
    lotra_layers,
    refused,
)


MOVES = {
    "own": lambda layer, x: layer.update_grid(x),
    "efficient-kan": lambda layer, x: layer.update_grid(x),
    "pykan": lambda layer, x: layer.update_grid_from_samples(x),
    "pina": lambda layer, x: layer.spline._knots.mul_(1.1),
}


@pytest.mark.parametrize("kind", MOVES)
def test_a_moved_grid_is_refused_until_the_adapter_is_merged(kind):
    model, x = adapt(base(kind)), inputs(400) * 0.6 + 0.1
    layer = layer_of(model)
    if kind != "pina":
        with refused("Merge them first", model, error=RuntimeError):
            MOVES[kind](layer, x)
    unmoved = copy.deepcopy(model)
    MOVES[kind](layer.base_layer, x)

    with pytest.raises(RuntimeError, match="The grid of `kan` .* was moved"):
        model(x)

    merged = unmoved.merge_and_unload()
    MOVES[kind](merged.kan, x)
    again = adapt(merged, init_weights=True)

    assert_equal(again(x), merged(x))


def test_a_moved_grid_is_an_error_of_unmerging():
    model = adapt(base("own"))
    layer = layer_of(model)
    model.merge_adapter()
    layer.update_grid(X * 0.5)
    model(X)

    with pytest.raises(RuntimeError, match="was moved"):
        model.unmerge_adapter()

    model.merge_and_unload()(X)


def test_a_grid_assigned_in_other_memory_has_not_moved():
    model = adapt()
    y, layer = model(X), next(iter(lotra_layers(model).values())).base_layer
    before = layer.grid_bounds
    layer.grid_bounds = before * 1.5

    with pytest.raises(RuntimeError, match="grid"):
        model(X)

    layer.grid_bounds = before.clone()  # back, in other memory

    assert_equal(model(X), y)


def test_update_grid_of_an_adapted_network_is_refused():
    model = adapt()

    with refused("adapt the model again", model, error=RuntimeError):
        model.base_model.model.kan.update_grid(X / 2)


def test_a_grid_may_move_while_there_is_no_adapter():
    model = adapt(base("efficient-kan"))
    model(X)
    layer = layer_of(model)
    model.delete_adapter("default")
    layer.base_layer.update_grid(X)
    add_adapter(model, "new")
    model.set_adapter("new")
    y = model(X)
    model.merge_adapter()

    assert_near(model(X), y)
