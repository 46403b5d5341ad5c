# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a watch on a base layer notices."""

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import FAMILIES

from peft_lotra.families.registry import get_kan_spec
from peft_lotra.tuner.grid_watch import GridWatch, has_hooks


def look(watch, layer):
    spec = get_kan_spec(layer)
    return watch.look(layer, spec.read_grid(layer), spec.locate(layer).get_parameter(layer))


CHANGES = {
    "grid": lambda layer: layer.grid.add_(0.1),
    "another tensor": lambda layer: layer.register_buffer("grid", layer.grid.clone()),
    "dtype": lambda layer: layer.double(),
    "mode": lambda layer: layer.eval(),
    "hooks": lambda layer: layer.register_forward_hook(lambda *args: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices(change):
    layer, watch = FAMILIES["efficient-kan"](3, 4), GridWatch()
    assert look(watch, layer) and watch.changed
    watch.changed = False
    assert look(watch, layer) and not watch.changed
    CHANGES[change](layer)
    assert look(watch, layer) and watch.changed
    watch.changed = False
    assert look(watch, layer) and not watch.changed


def test_coefficients_do_not_count():
    layer, watch = FAMILIES["efficient-kan"](3, 4), GridWatch()
    look(watch, layer)
    watch.changed = False
    torch.nn.init.ones_(layer.spline_weight)
    assert look(watch, layer) and not watch.changed


def test_compares_grids_with_records():
    layer, watch = FAMILIES["efficient-kan"](3, 4), GridWatch()
    spec = get_kan_spec(layer)
    grid, record = spec.read_grid(layer), copy.deepcopy(spec.read_grid(layer))
    look(watch, layer)
    assert watch.is_equal(grid, record) and watch.is_equal(grid, record)
    layer.grid.data.mul_(2)  # which leaves no trace in the version
    look(watch, layer)
    assert not watch.is_equal(grid, record)


def test_a_batch_of_grids_has_no_content():
    layer, watch = FAMILIES["efficient-kan"](3, 4), GridWatch()
    spec = get_kan_spec(layer)
    looked = []

    def function(grid):
        looked.append(watch.look(layer, {"grid": grid}, spec.locate(layer).get_parameter(layer)))
        return grid

    torch.vmap(function)(layer.grid.expand(2, *layer.grid.shape))
    assert looked == [False]


def test_a_copy_looks_anew():
    layer, watch = FAMILIES["efficient-kan"](3, 4), GridWatch()
    look(watch, layer)
    watch.changed = False
    assert copy.deepcopy(watch).changed


def test_hooks():
    layer = torch.nn.Linear(2, 2)
    assert not has_hooks(layer)
    handle = layer.register_full_backward_hook(lambda *args: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)


def test_there_is_nothing_to_compare_on_meta():
    layer, watch = FAMILIES["efficient-kan"](3, 4), GridWatch()
    assert look(watch, layer) and not look(watch, layer.to("meta"))
