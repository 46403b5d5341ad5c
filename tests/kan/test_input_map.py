# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""TanhBound, which maps each input separately."""

import torch
from torch.testing import assert_close

from peft_lotra.kan import KAN, refine_grid


def test_bounded_activations_stay_on_grids_that_a_refinement_does_not_extend():
    net = KAN([2, 6, 6, 1], grid_size=4, spline_order=5, grid_range=(-1, 3), norm="tanh", dtype=torch.float64)
    with torch.no_grad():
        net.layers[0].spline_weight.mul_(50)  # far beyond the grid of the next layer
    x = 4 * torch.rand(200, 2, dtype=torch.float64) - 1
    unbounded = net.layers[0](x)
    bounded = net.layers[1](unbounded)
    y = net(x)

    refine_grid(net, 8, x)

    assert unbounded.abs().max() > 5
    assert bounded.min() >= -1
    assert bounded.max() <= 3
    assert [net.layers[i].grid_size for i in (0, 2)] == [8, 8]
    assert_close(net(x), y)
