# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Points between those of a fit, at which indicators are estimated by default."""

import pytest
import torch
from torch import nn

from peft_lotra.parametric.held_out import held_out_terms


LINE = torch.linspace(-1, 1, 20, dtype=torch.float64).unsqueeze(1)
PLANE = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def residual(model, *rows):
    return rows[0]


def held_out_rows(*rows, width):
    """Return the rows of each term that is held out, of a network with `width` inputs."""
    terms = held_out_terms([(residual, rows, 3.0)], nn.Linear(width, 1).double())
    assert all(function is residual and weight == 3.0 for function, _, weight in terms.values())
    return [rows for _, rows, _ in terms.values()]


def test_points_on_a_line_are_held_out_between_neighbors():
    ((x, c),) = held_out_rows(LINE, torch.full((20, 1), 0.5), width=1)

    assert len(x) == 38
    assert torch.cdist(x, LINE).min() > 0.2 * (LINE[1] - LINE[0])  # never at a point of the fit
    assert torch.cdist(x, x).fill_diagonal_(1).min() > 1e-3
    assert (c == 0.5).all()


@pytest.mark.parametrize("seed", range(2))
def test_no_gap_between_random_points_is_left(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(60, 1, generator=generator, dtype=torch.float64)
    line = points.sort(dim=0).values
    widths = line.diff(dim=0).flatten()

    ((x,),) = held_out_rows(points, width=1)

    for gap in widths.topk(40).indices:
        low = line[gap] + 0.2 * widths[gap]
        high = line[gap + 1] - 0.2 * widths[gap]
        assert ((x > low) & (x < high)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smooth_data_are_interpolated(dtype):
    def source(x):
        waves = torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1])
        squares = x.sum(1, keepdim=True).expand(-1, 3).unsqueeze(1) ** 2
        return waves, squares

    points = torch.cat([PLANE, PLANE[:3]]).to(dtype)  # three points occur twice, without effect

    ((x, *data),) = held_out_rows(points, *source(points), width=2)

    for values, expected in zip(data, source(x), strict=True):
        assert values.dtype == dtype
        assert values.shape == expected.shape
        assert (values - expected).norm() < 2e-3 * expected.norm()


def test_points_between_those_on_the_sides_of_a_box_stay_on_the_sides():
    number = torch.arange(200)
    rim = PLANE.clone()
    rim[number, number % 2] = torch.where(number % 3 > 0, 1.0, -1.0).double()

    ((x,),) = held_out_rows(rim, width=2)

    assert len(x) > 150
    assert (x.abs() == 1).any(dim=1).all()


@pytest.mark.parametrize(
    "rows, width",
    [
        ((PLANE, torch.rand(200, 1)), 2),  # noise
        ((PLANE, (PLANE[:, :1] > 0.2).double()), 2),  # a jump
        ((PLANE, torch.arange(200)), 2),
        ((LINE[:2],), 1),  # the ends of an interval
        ((PLANE,), 3),  # the network expects three columns
    ],
    ids=["noise", "jump", "integers", "ends", "width"],
)
def test_nothing_is_held_out_where_data_cannot_be_interpolated(rows, width):
    assert not held_out_rows(*rows, width=width)


def test_each_gap_gets_two_points_also_of_other_points_later():
    """Gaps are cached by the points."""
    for points in (LINE, LINE.clone(), LINE[:-1]):
        ((x,),) = held_out_rows(points, width=1)

        assert len(x) == 2 * len(points) - 2


def test_of_many_points_every_third_gap_gets_two():
    points = torch.linspace(-1, 1, 3000, dtype=torch.float64).unsqueeze(1)

    ((x, c),) = held_out_rows(points, torch.full_like(points, 0.5), width=1)

    assert len(x) == len(c) == 1998
