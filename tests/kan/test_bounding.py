# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.derivatives.torch_fallback import jet_by_transforms
from peft_lotra.kan import KAN, TanhBound, jet, refine_grid


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_bounded_activations_stay_on_the_grids_and_have_closed_jets():
    net = KAN([2, 6, 6, 1], grid_size=4, spline_order=5, grid_range=(-1, 3), norm="tanh", dtype=torch.float64)
    with torch.no_grad():
        net.layers[0].spline_weight.mul_(50)  # far beyond the grid of the next layer
    x = 4 * torch.rand(200, 2, dtype=torch.float64) - 1
    first = net.layers[1](net.layers[0](x))
    assert net.layers[0](x).abs().max() > 5 and first.min() >= -1 and first.max() <= 3
    found = jet(net, x)
    expected = jet_by_transforms(net, x, torch.eye(2, dtype=x.dtype), None)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other)


def test_bounded_networks_are_refined_exactly():
    net = KAN([2, 6, 1], grid_size=4, spline_order=5, norm="tanh", dtype=torch.float64)
    x = 2 * torch.rand(200, 2, dtype=torch.float64) - 1
    before = net(x)
    refine_grid(net, 8, x, exact=True)
    assert [net.layers[i].grid_size for i in (0, 2)] == [8, 8]  # not extended
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (0.0, float("inf"))])
def test_refuses_bounds(ends):
    with pytest.raises(ValueError, match="`low` is"):
        TanhBound(3, *ends)
