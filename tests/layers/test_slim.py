# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of other libraries in Tucker form; `compress/test_slim.py` compares what they compute."""

import copy
import pickle

import pytest
import torch
from helpers import assert_equal, inputs
from stand_ins import LAYER_KINDS
from torch.testing import assert_close

from peft_lotra import find_kan_layers, slim, to_dense
from peft_lotra.layers.recognize import get_kan_spec


@pytest.fixture
def small():
    return slim(LAYER_KINDS["efficient-kan"](6, 5), (2, 2, 2))


def test_its_kind_is_slim_on_the_grid_of_the_dense_layer(small):
    dense = to_dense(small)
    spec, dense_spec = get_kan_spec(small), get_kan_spec(dense)

    tensor, dense_tensor = spec.locate(small), dense_spec.locate(dense)

    assert spec.kind == "slim"
    assert_close(tensor.read(small), dense_tensor.read(dense), rtol=1e-5, atol=1e-5)
    assert tensor.shape == dense_tensor.shape
    assert set(spec.read_grid(small)) == {f"layer.{name}" for name in dense_spec.read_grid(dense)}
    assert [row.name for row in find_kan_layers(torch.nn.Sequential(small))] == ["0"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_values_and_grid(small, copied):
    x = inputs(20, in_features=6)

    layer = copied(small)

    assert_equal(layer(x), small(x))
    grid = get_kan_spec(layer).read_grid(layer)
    assert grid
    assert grid.keys() == get_kan_spec(small).read_grid(small).keys()


def test_attributes_and_methods_are_those_of_the_layer(small):
    dense = to_dense(small)

    assert_close(small.regularization_loss(), dense.regularization_loss(), rtol=1e-4, atol=1e-4)
    assert small.spline_weight.shape == dense.spline_weight.shape
    assert small.ranks == (2, 2, 2)
    assert (small.in_features, small.out_features) == (6, 5)
    assert "kind=efficient-kan, ranks=(2, 2, 2)" in repr(small)


def test_a_method_that_moves_the_grid_and_a_missing_attribute_are_refused(small):
    with pytest.raises(RuntimeError, match="`update_grid` refits the coefficients"):
        small.update_grid(inputs(20, in_features=6))
    with pytest.raises(AttributeError, match="no_such"):
        small.no_such  # noqa: B018
