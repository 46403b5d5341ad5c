# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Divergence and curl."""

from __future__ import annotations

import pytest
import torch
from jet_helpers import network, points

from peft_lotra.kan import curl, divergence


@pytest.mark.parametrize(("inputs", "outputs", "dims"), [(3, 3, None), (2, 2, None), (3, 3, 2), (4, 5, 3), (3, 2, 2)])
def test_agree_with_the_jacobian(inputs, outputs, dims):
    model, x = network(inputs, 5, outputs), points(12, inputs).view(3, 4, inputs)
    n = dims or inputs
    slopes = torch.func.vmap(torch.func.jacrev(model))(x.flatten(0, 1)).view(3, 4, outputs, inputs)  # d u_o / d x_i
    expected = sum(slopes[..., i, i] for i in range(n)).unsqueeze(-1)
    torch.testing.assert_close(divergence(model, x, dims), expected)
    pairs = [(0, 1)] if n == 2 else [(1, 2), (2, 0), (0, 1)]
    expected = torch.stack([slopes[..., j, i] - slopes[..., i, j] for i, j in pairs], -1)
    torch.testing.assert_close(curl(model, x, dims), expected)


@pytest.mark.parametrize("function", [divergence, curl])
@pytest.mark.parametrize(("outputs", "dims"), [(2, None), (4, None), (1, 2), (3, 4)])
def test_other_numbers_of_components(function, outputs, dims):
    with pytest.raises(ValueError, match=rf"has {outputs} components of 3 coordinates, and `dims` is {dims}"):
        function(network(3, 4, outputs), points(), dims)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="curl needs 2 or 3 coordinates, but there are 1"):
        curl(network(3, 4, 3), points(), 1)
    with pytest.raises(ValueError, match="`dims` is 0, but must be an integer of at least 1"):
        divergence(network(3, 4, 3), points(), 0)
    with pytest.raises(TypeError, match="`x` must be a floating point tensor"):
        divergence(network(3, 4, 3), "x")
