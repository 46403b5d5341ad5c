# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Where a layer keeps its coefficients: reading, writing and parts, in every layout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from stand_ins import FAMILIES

from peft_lotra.families.coefficients import get_or_none
from peft_lotra.families.registry import get_kan_spec


def located(family):
    torch.manual_seed(0)
    layer = FAMILIES[family](3, 4)
    return layer, get_kan_spec(layer).locate(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_those_of_the_whole(family):
    layer, tensor = located(family)
    whole = tensor.read(layer)
    assert whole.shape == (*tensor.shape[:2], tensor.shape[2] + tensor.has_residual)
    coefficients, residual = tensor.read_parts(layer)
    assert torch.equal(coefficients, tensor.read(layer, residual=False))
    assert torch.equal(coefficients, whole[..., : tensor.shape[2]])
    assert (residual is not None) == tensor.has_residual
    assert residual is None or torch.equal(residual, whole[..., -1])
    assert tensor.get_parameter(layer) is tensor.read_parameters(layer)[tensor.name]


@pytest.mark.parametrize("family", FAMILIES)
def test_split_is_the_inverse_of_join(family):
    layer, tensor = located(family)
    whole = torch.randn(tensor.read(layer).shape)
    parts = tensor.split(whole)
    assert {name: part.shape for name, part in parts.items()} == {
        name: part.shape for name, part in tensor.read_parameters(layer).items()
    }
    assert torch.equal(tensor.join(list(parts.values())), whole)
    coefficients, _ = tensor.read_parts(layer, parts)  # in the place of the layer's own
    assert torch.equal(coefficients, whole[..., : tensor.shape[2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_without_the_residual_slice_leaves_the_residual_weights(family):
    layer, tensor = located(family)
    parts = tensor.split(torch.ones(tensor.shape))
    whole = torch.zeros(tensor.read(layer).shape)
    whole[..., : tensor.shape[2]] = 1
    stored = [parts.get(name, torch.zeros_like(value)) for name, value in tensor.read_parameters(layer).items()]
    assert torch.equal(tensor.join(stored), whole)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))])
def test_copies(copy_of):
    layer, tensor = located("inkan")
    expected = tensor.read(layer)
    copied = copy_of(tensor)
    assert copied == tensor and torch.equal(copied.read(layer), expected)


def test_get_or_none():
    layer, _ = located("fast-kan")
    assert get_or_none(layer, "spline_linear.weight") is layer.spline_linear.weight
    assert get_or_none(layer, "spline_linear.no.such") is None
