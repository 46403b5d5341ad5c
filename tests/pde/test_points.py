# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from helpers import refuses

from peft_lotra.pde import ResidualSampler, box_points, side_points


LOW, HIGH = (-1.0, 2.0), (3.0, 2.5)
BOX = torch.tensor([LOW, HIGH], dtype=torch.float64)


def test_points_fill_the_box_as_the_seed_says():
    x = box_points(LOW, HIGH, 512, seed=3)

    assert x.dtype == torch.float64
    assert ((x >= BOX[0]) & (x <= BOX[1])).all()
    torch.testing.assert_close(x.mean(0), BOX.mean(0), rtol=0.1, atol=0.05)
    assert torch.equal(x, box_points(LOW, HIGH, 512, seed=3))
    assert not torch.equal(x, box_points(LOW, HIGH, 512, seed=4))


def test_each_side_has_its_points_and_normals():
    x, normals = side_points(LOW, HIGH, 20)

    assert x.shape == normals.shape == (80, 2)
    sides = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (coordinate, end), points, normal in zip(sides, x.split(20), normals.split(20), strict=True):
        assert (points[:, coordinate] == BOX[end, coordinate]).all()
        assert points[:, 1 - coordinate].unique().numel() == 20
        assert (normal[:, coordinate] == 2 * end - 1).all()
        assert (normal[:, 1 - coordinate] == 0).all()


WRONG = {
    "`count` is 0": lambda: box_points(LOW, HIGH, 0),
    "`count` is 2.5": lambda: box_points(LOW, HIGH, 2.5),
    "`seed` is 'a'": lambda: box_points(LOW, HIGH, 5, seed="a"),
    r"`sides` has \(2, 'low'\)": lambda: side_points(LOW, HIGH, 5, [(2, "low")]),
    r"`sides` has \(0, 'left'\)": lambda: side_points(LOW, HIGH, 3, [(0, "left")]),
    r"`share` is 2, but must be a number in \[0, 1\]": lambda: ResidualSampler(LOW, HIGH, 8, share=2),
    r"`residual` returns .* of shape \(\) for 48 rows": lambda: ResidualSampler(LOW, HIGH, 40).draw(lambda x: x.sum()),
    r"`residual` returns .* of shape \(9,\)": lambda: ResidualSampler(LOW, HIGH, 40).draw(lambda x: x[:9, 0]),
    "`residual` returns NoneType": lambda: ResidualSampler(LOW, HIGH, 40).draw(lambda x: None),
    r"`residual` is not finite at \[": lambda: ResidualSampler(LOW, HIGH, 40).draw(lambda x: x[:, 0] / 0),
}


test_wrong_arguments_are_named = refuses(WRONG)


@pytest.mark.parametrize(
    "low, high", [((0,), (1, 1)), ((), ()), (0, 1), ((1,), (1,)), ((0,), (math.inf,)), ((2,), (1,))]
)
def test_what_is_no_box_is_refused(low, high):
    with pytest.raises(ValueError, match="`low` is .* and `high` is .* each `low` below its `high`"):
        box_points(low, high, 5)


def peak(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-200 * (x[:, :1] - 1) ** 2)


def share_around_the_peak(x: torch.Tensor) -> float:
    """Return the share of points in a tenth of the box."""
    return ((x[:, 0] - 1).abs() < 0.2).double().mean().item()


@pytest.mark.parametrize("share, expected", [(0, 0.1), (0.5, 0.57), (1, 0.98)])
def test_a_share_of_the_points_follows_the_residual(share, expected):
    x = ResidualSampler(LOW, HIGH, 400, share=share, pool=16).draw(peak)

    assert x.shape == (400, 2)
    assert share_around_the_peak(x) == pytest.approx(expected, abs=0.08)


def test_points_are_drawn_again_each_time():
    sampler = ResidualSampler(LOW, HIGH, 400, share=0.5, pool=16)

    first, second = sampler.draw(peak), sampler.draw(peak)

    assert not torch.equal(first[:200], second[:200])


def test_a_residual_of_zero_spreads_points():
    x = ResidualSampler(LOW, HIGH, 400, share=1.0).draw(lambda x: torch.zeros(len(x)))

    torch.testing.assert_close(x.mean(0), BOX.mean(0), rtol=0.1, atol=0.1)


def test_a_residual_may_use_autograd():
    def slope(x):
        return torch.autograd.grad(peak(x.requires_grad_()).sum(), x)[0]

    x = ResidualSampler(LOW, HIGH, 40).draw(slope)

    assert x.shape == (40, 2)
    assert not x.requires_grad
