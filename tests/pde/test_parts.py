# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Features of coordinates, and weights of residuals."""

from __future__ import annotations

import math

import torch
from helpers import refuses
from jet_helpers import nested, network

from peft_lotra.pde.adaptive import gradient_weights
from peft_lotra.pde.features import BoxFeatures


LOW, HIGH = (-1.0, 0.0, 2.0), (3.0, 2.0, 5.0)


def in_box(rows: int = 20) -> torch.Tensor:
    low, high = torch.tensor([LOW, HIGH], dtype=torch.float64)
    return torch.lerp(low, high, torch.rand(rows, 3, dtype=torch.float64))


def test_features_have_the_formula():
    features = BoxFeatures(LOW, HIGH, periodic=[0])
    points = in_box()
    x, y, z = points.T
    angle = 2 * math.pi * (x + 1) / 4

    assert features.out_features == 4
    expected = [torch.cos(angle), torch.sin(angle), y - 1, 2 * (z - 2) / 3 - 1]
    torch.testing.assert_close(features(points), torch.stack(expected, 1))


WRONG = {
    r"`periodic` has 3, but the box has coordinates 0 to 2": lambda: BoxFeatures(LOW, HIGH, periodic=[3]),
    "BoxFeatures expects a last dimension of 3": lambda: BoxFeatures(LOW, HIGH)(torch.rand(4, 2)),
}


test_wrong_arguments_are_named = refuses(WRONG)


def test_gradient_weights_have_the_formula():
    model, x = network(2, 5, 2), torch.rand(20, 2, dtype=torch.float64)
    along = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    slopes = nested(model, x)[1]  # (2, 20, 2)

    weights = gradient_weights(model, x, 0.3)
    weights_along = gradient_weights(model, x, 0.3, along)

    assert not weights.requires_grad
    torch.testing.assert_close(weights[:, 0], 1 / (1 + 0.3 * slopes.square().sum((0, 2)).sqrt()))
    torch.testing.assert_close(weights_along[:, 0], 1 / (1 + 0.3 * slopes[0].square().sum(1).sqrt()))
