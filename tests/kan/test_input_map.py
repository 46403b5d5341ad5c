# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Maps of each input by itself: those of users, KnotMap and TanhBound."""

from __future__ import annotations

import pytest
import torch

from peft_lotra.kan import KAN, KnotMap, TanhBound, refine_grid


LOW, HIGH = torch.tensor([-1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)


def uneven(cells: int = 20) -> KnotMap:
    return KnotMap(LOW, HIGH, torch.rand(2, cells, dtype=torch.float64) * 9 + 1)


def test_an_even_density_is_the_identity():
    x = torch.randn(40, 2, dtype=torch.float64) * 3
    torch.testing.assert_close(KnotMap(LOW, HIGH, torch.ones(2, 7))(x), x)


@pytest.mark.parametrize("cells", [1, 3, 20])
def test_knot_maps_are_monotone_onto_the_interval_and_twice_differentiable(cells):
    knots = uneven(cells)
    torch.testing.assert_close(knots(torch.stack([LOW, HIGH])), torch.stack([LOW, HIGH]))
    x = torch.linspace(-2, 6, 1001, dtype=torch.float64)[:, None].expand(-1, 2)
    assert (knots(x).diff(dim=0) > 0).all()
    for end in (LOW, HIGH):
        below, above = (knots.evaluate((end + shift).unsqueeze(0), 2) for shift in (-1e-9, 1e-9))
        for a, b in zip(below, above, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    x = LOW + (HIGH - LOW) * torch.rand(30, 2, dtype=torch.float64)
    torch.testing.assert_close(knots.inverse(knots(x)), x)


def test_the_slope_of_a_knot_map_follows_the_density():
    step = torch.ones(2, 60, dtype=torch.float64)
    step[:, 30:] = 4  # four times as many knots in the upper half
    _, slope, _ = KnotMap(LOW, HIGH, step).evaluate(torch.stack([LOW, HIGH]), 2)
    torch.testing.assert_close(slope[1] / slope[0], torch.full_like(LOW, 4))


def test_bounded_activations_stay_on_the_grids_and_have_closed_jets():
    net = KAN([2, 6, 6, 1], grid_size=4, spline_order=5, grid_range=(-1, 3), norm="tanh", dtype=torch.float64)
    with torch.no_grad():
        net.layers[0].spline_weight.mul_(50)  # far beyond the grid of the next layer
    x = 4 * torch.rand(200, 2, dtype=torch.float64) - 1
    first = net.layers[1](net.layers[0](x))
    assert net.layers[0](x).abs().max() > 5 and first.min() >= -1 and first.max() <= 3
    before = net(x)
    refine_grid(net, 8, x)
    assert [net.layers[i].grid_size for i in (0, 2)] == [8, 8]  # not extended
    torch.testing.assert_close(net(x), before)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"shape \(4, 3\), but TanhBound expects a last dimension of 2"):
        TanhBound(2)(torch.rand(4, 3))
    zeros = torch.zeros(2, 4)
    for low, high, density in ((LOW, HIGH, torch.ones(3, 4)), (HIGH, LOW, zeros + 1), (LOW, HIGH, zeros)):
        with pytest.raises(ValueError, match=r"`density` .* must be .* below its `high`, .* above zero"):
            KnotMap(low, high, density)
    for ends in ((1.0, 1.0), (0.0, torch.inf)):
        with pytest.raises(ValueError, match="`low` is"):
            TanhBound(3, *ends)
