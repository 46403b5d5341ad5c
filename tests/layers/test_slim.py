# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of other libraries in Tucker form; `compress/test_slim.py` compares what they compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import inputs
from stand_ins import FAMILIES

from peft_lotra import find_kan_layers, slim, to_dense
from peft_lotra.layers.registry import get_kan_spec


@pytest.fixture
def small():
    return slim(FAMILIES["efficient-kan"](6, 5), (2, 2, 2))


def test_its_kind_is_slim_on_the_grid_of_the_layer_inside(small):
    dense = to_dense(small)
    spec, inner = get_kan_spec(small), get_kan_spec(dense)
    tensor = spec.locate(small)
    assert spec.family == "slim" and tensor.shape == inner.locate(dense).shape
    assert torch.allclose(tensor.read(small), inner.locate(dense).read(dense), atol=1e-5)
    assert set(spec.read_grid(small)) == {f"layer.{name}" for name in inner.read_grid(dense)}
    assert [layer.name for layer in find_kan_layers(torch.nn.Sequential(small))] == ["0"]


def test_copies_keep_family_and_grid(small):
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(copied(x := inputs(20, in_features=6)), small(x))
        assert get_kan_spec(copied).read_grid(copied).keys() == get_kan_spec(small).read_grid(small).keys() != set()


def test_attributes_methods_and_grids(small):
    dense = to_dense(small)
    torch.testing.assert_close(small.regularization_loss(), dense.regularization_loss(), rtol=1e-4, atol=1e-4)
    assert small.spline_weight.shape == dense.spline_weight.shape and small.ranks == (2, 2, 2)
    assert (small.in_features, small.out_features) == (6, 5)
    with pytest.raises(RuntimeError, match="`update_grid` refits the coefficients"):
        small.update_grid(inputs(20, in_features=6))
    with pytest.raises(AttributeError, match="no_such"):
        small.no_such  # noqa: B018
    assert "kind=efficient-kan, ranks=(2, 2, 2)" in repr(small)
