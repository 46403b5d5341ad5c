# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import assert_same, nested, network
from torch import nn

from peft_lotra.kan import KnotMap, jet


LOW, HIGH = torch.tensor([-1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)


def uneven(cells: int = 20) -> KnotMap:
    return KnotMap(LOW, HIGH, torch.rand(2, cells, dtype=torch.float64) * 9 + 1)


def test_an_even_density_is_the_identity():
    x = torch.randn(40, 2, dtype=torch.float64) * 3
    torch.testing.assert_close(KnotMap(LOW, HIGH, torch.ones(2, 7))(x), x)


def test_monotone_onto_the_interval_with_the_slope_of_the_density():
    knots = uneven()
    torch.testing.assert_close(knots(torch.stack([LOW, HIGH])), torch.stack([LOW, HIGH]))
    x = torch.linspace(-2, 6, 1001, dtype=torch.float64)[:, None].expand(-1, 2)
    assert (knots(x).diff(dim=0) > 0).all()
    step = torch.ones(2, 60, dtype=torch.float64)
    step[:, 30:] = 4  # four times as many knots in the upper half
    value, slope, _ = KnotMap(LOW, HIGH, step).evaluate(torch.stack([LOW, HIGH]))
    torch.testing.assert_close(slope[1] / slope[0], torch.full_like(LOW, 4))


@pytest.mark.parametrize("cells", [1, 3, 5])
def test_few_cells(cells):
    knots = uneven(cells)
    torch.testing.assert_close(knots(torch.stack([LOW, HIGH])), torch.stack([LOW, HIGH]))


@pytest.mark.filterwarnings("error:`jet` knows no closed form")
def test_jets_inside_and_outside_of_the_interval():
    model = nn.Sequential(uneven(), network(2, 4, 1))
    x = torch.rand(60, 2, dtype=torch.float64) * 6 - 1.5
    assert_same(jet(model, x), nested(model, x))


def test_the_map_is_twice_continuously_differentiable_at_the_ends():
    knots = uneven()
    for end in (LOW, HIGH):
        below, above = (knots.evaluate((end + shift).unsqueeze(0)) for shift in (-1e-9, 1e-9))
        for a, b in zip(below, above, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_inverse():
    knots, x = uneven(), LOW + (HIGH - LOW) * torch.rand(30, 2, dtype=torch.float64)
    torch.testing.assert_close(knots.inverse(knots(x)), x)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"`density` \(3, 4\) must be"):
        KnotMap(LOW, HIGH, torch.ones(3, 4))
    with pytest.raises(ValueError, match="below its `high`"):
        KnotMap(HIGH, LOW, torch.ones(2, 4))
    for value in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="`density` must be finite and above zero"):
            KnotMap(LOW, HIGH, torch.full((2, 4), value))
