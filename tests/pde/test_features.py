# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch

from peft_lotra.pde import BoxFeatures


LOW, HIGH = (-1.0, 0.0, 2.0), (3.0, 2.0, 5.0)


def box(rows: int = 20) -> torch.Tensor:
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    return low + (high - low) * torch.rand(rows, 3, dtype=torch.float64)


def test_features_against_the_formula():
    x = box()
    x_0, x_1, x_2 = (x[:, i] for i in range(3))
    angle = 2 * math.pi * (x_0 + 1) / 4
    expected = [torch.cos(angle), torch.sin(angle), x_1 - 1, -torch.cos(math.pi * (x_2 - 2) / 3)]
    features = BoxFeatures(LOW, HIGH, periodic=[0], neumann=[2])
    assert features.out_features == 4
    torch.testing.assert_close(features(x), torch.stack(expected, 1))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="has 3, but the box has coordinates 0 to 2"):
        BoxFeatures(LOW, HIGH, periodic=[3])
    with pytest.raises(ValueError, match="Coordinate 1 is both"):
        BoxFeatures(LOW, HIGH, periodic=[1], neumann=[1])
    with pytest.raises(ValueError, match="BoxFeatures expects a last dimension of 3"):
        BoxFeatures(LOW, HIGH)(torch.rand(4, 2))
