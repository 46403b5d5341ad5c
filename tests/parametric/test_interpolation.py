# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.parametric.interpolation import is_inside, weights_at


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


TRIANGLE = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
LINE = [[0.2], [0.8]]


@pytest.mark.parametrize(
    "points, target, expected",
    [
        (TRIANGLE, [0.3, 0.3], True),
        (TRIANGLE, [0.5, 0.5], True),
        (TRIANGLE, [0.6, 0.6], False),
        (TRIANGLE, [-0.01, 0.5], False),
        (LINE, [0.2], True),
        (LINE, [0.8], True),
        (LINE, [0.8 + 1e-6], False),
    ],
)
def test_the_hull_holds_its_boundary(points, target, expected):
    points = torch.tensor(points, dtype=torch.float64)
    target = torch.tensor(target, dtype=torch.float64)

    assert is_inside(points, target) is expected
