# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of other libraries in Tucker form."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import inputs, relative
from stand_ins import FAMILIES

from peft_lotra.layers.registry import find_kan_layers, get_kan_spec
from peft_lotra.layers.slim import SlimLayer
from peft_lotra.tucker import tucker


FOREIGN = [family for family in FAMILIES if family != "own"]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def slim_and_dense(family, ranks=(2, 2, 2)):
    """A Slim layer, and a layer of the original class with the coefficients that the factors make."""
    torch.manual_seed(0)
    layer = FAMILIES[family](3, 4)
    spec = get_kan_spec(layer)
    scale = spec.find_edge_scale(layer)
    if scale is not None:
        torch.nn.init.ones_(getattr(layer, scale))
    tensor = spec.locate(layer)
    components = tucker(tensor.read(layer).detach(), ranks)
    with torch.no_grad():
        for name, part in tensor.split(components.dense()).items():
            layer.get_parameter(name).copy_(part)
    return SlimLayer(copy.deepcopy(layer), spec, components), layer


@pytest.mark.parametrize("family", FOREIGN)
def test_computes_what_the_layer_computes(family):
    slim, dense = slim_and_dense(family)
    x = inputs(20)
    assert relative(first(slim(x)), first(dense(x))) < 1e-5
    restored = slim.to_dense()
    assert type(restored) is type(dense) and relative(first(restored(x)), first(dense(x))) < 1e-5
    assert {n: p.shape for n, p in restored.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}


def test_its_kind_is_slim_on_the_grid_of_the_layer_inside():
    slim, dense = slim_and_dense("efficient-kan")
    spec, inner = get_kan_spec(slim), get_kan_spec(dense)
    tensor = spec.locate(slim)
    assert spec.family == "slim" and tensor.shape == inner.locate(dense).shape
    assert torch.allclose(tensor.read(slim), inner.locate(dense).read(dense), atol=1e-5)
    assert set(spec.read_grid(slim)) == {f"layer.{name}" for name in inner.read_grid(dense)}
    assert [layer.name for layer in find_kan_layers(torch.nn.Sequential(slim))] == ["0"]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_family_and_grid(copy_of):
    slim, _ = slim_and_dense("efficient-kan")
    x = inputs(20)
    copied = copy_of(slim)
    assert torch.equal(copied(x), slim(x))
    assert get_kan_spec(copied).read_grid(copied).keys() == get_kan_spec(slim).read_grid(slim).keys() != set()


def test_attributes_methods_and_grids():
    slim, dense = slim_and_dense("efficient-kan")
    torch.testing.assert_close(slim.regularization_loss(), dense.regularization_loss(), rtol=1e-4, atol=1e-4)
    assert slim.spline_weight.shape == dense.spline_weight.shape and slim.ranks == (2, 2, 2)
    assert (slim.in_features, slim.out_features) == (3, 4)
    with pytest.raises(RuntimeError, match="`update_grid` refits the coefficients"):
        slim.update_grid(inputs(20))
    with pytest.raises(AttributeError, match="no_such"):
        slim.no_such  # noqa: B018
    assert "kind=efficient-kan, ranks=(2, 2, 2)" in repr(slim)
