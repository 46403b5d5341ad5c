# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import pytest
import torch

from peft_lotra.parametric.interpolation import weights_at


def random_points(count, dim):
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def polynomial(points):
    return 1 + points.sum(1) - 2 * points[:, 0] * points[:, -1]


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_polynomials_are_reproduced_inside_and_outside(dim):
    points = random_points(12, dim)
    outside = torch.full((dim,), 1.3, dtype=torch.float64)
    targets = torch.stack([points.mean(0), outside])

    weights = weights_at(points, targets)

    torch.testing.assert_close(weights.T @ polynomial(points), polynomial(targets), rtol=0, atol=1e-9)
