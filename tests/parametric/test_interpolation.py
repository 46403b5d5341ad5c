# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.parametric.interpolation import is_inside, weights_at


def places(count, dim, seed=0):
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_polynomials_are_reproduced_inside_and_outside(dim):
    points = places(12, dim)
    values = 1 + points.sum(1) - 2 * points[:, 0] * points[:, -1]
    at = torch.stack([points.mean(0), torch.full((dim,), 1.3, dtype=torch.float64)])
    expected = 1 + at.sum(1) - 2 * at[:, 0] * at[:, -1]
    torch.testing.assert_close(weights_at(points, at).T @ values, expected, rtol=0, atol=1e-9)


def test_the_hull():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for at, expected in (([0.3, 0.3], True), ([0.5, 0.5], True), ([0.6, 0.6], False), ([-0.01, 0.5], False)):
        assert is_inside(square, torch.tensor(at, dtype=torch.float64)) is expected
    line = torch.tensor([[0.2], [0.8]], dtype=torch.float64)
    assert is_inside(line, line[0]) and is_inside(line, line[1]) and not is_inside(line, line[1] + 1e-6)
