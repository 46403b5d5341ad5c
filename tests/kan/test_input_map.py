# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""KnotMap and TanhBound, which map each input separately."""

import pytest
import torch
from helpers import refused
from torch.testing import assert_close

from peft_lotra.kan import KAN, KnotMap, TanhBound, refine_grid


LOW, HIGH = torch.tensor([-1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)


def uneven(cells: int = 20) -> KnotMap:
    return KnotMap(LOW, HIGH, torch.rand(2, cells, dtype=torch.float64) * 9 + 1)


def test_an_even_density_is_the_identity():
    x = torch.randn(40, 2, dtype=torch.float64) * 3
    assert_close(KnotMap(LOW, HIGH, torch.ones(2, 7))(x), x)


@pytest.mark.parametrize("cells", [1, 3, 20])
def test_knot_maps_are_monotone_and_keep_the_ends(cells):
    knots = uneven(cells)
    ends = torch.stack([LOW, HIGH])
    x = torch.linspace(-2, 6, 1001, dtype=torch.float64)[:, None].expand(-1, 2)

    assert_close(knots(ends), ends)
    assert (knots(x).diff(dim=0) > 0).all()


@pytest.mark.parametrize("end", [LOW, HIGH])
def test_knot_maps_are_twice_differentiable_at_the_ends(end):
    knots = uneven()

    below = knots.evaluate((end - 1e-9).unsqueeze(0), 2)

    assert_close(below, knots.evaluate((end + 1e-9).unsqueeze(0), 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 3, 20])
def test_the_inverse_of_a_knot_map(cells):
    knots = uneven(cells)
    x = torch.lerp(LOW, HIGH, torch.rand(30, 2, dtype=torch.float64))

    assert_close(knots.inverse(knots(x)), x)


def test_the_slope_of_a_knot_map_follows_the_density():
    step = torch.ones(2, 60, dtype=torch.float64)
    step[:, 30:] = 4  # four times as many knots in the upper half
    _, slope, _ = KnotMap(LOW, HIGH, step).evaluate(torch.stack([LOW, HIGH]), 2)
    assert_close(slope[1] / slope[0], torch.full_like(LOW, 4))


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


def test_a_bound_of_another_width_is_refused():
    with refused(r"shape \(4, 3\), but TanhBound expects a last dimension of 2"):
        TanhBound(2)(torch.rand(4, 3))


@pytest.mark.parametrize(
    "low, high, density",
    [(LOW, HIGH, torch.ones(3, 4)), (HIGH, LOW, torch.ones(2, 4)), (LOW, HIGH, torch.zeros(2, 4))],
)
def test_wrong_knots_are_refused(low, high, density):
    with refused(r"`density` .* must be .* below its `high`, .* above zero"):
        KnotMap(low, high, density)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (0.0, torch.inf)])
def test_wrong_ends_of_a_bound_are_refused(ends):
    with refused("`low` is"):
        TanhBound(3, *ends)
