# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Points between those of a fit, at which indicators are estimated by default."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_lotra.parametric.held_out import held_out_terms


LINE = torch.linspace(-1, 1, 20, dtype=torch.float64).unsqueeze(1)
PLANE = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def residual(model, *rows):
    return rows[0]


def points(*rows, width):
    found = held_out_terms([(residual, rows, 3.0)], nn.Linear(width, 1).double())
    assert all(function is residual and weight == 3.0 for function, _, weight in found.values())
    return [rows for _, rows, _ in found.values()]


def test_between_neighbors_on_a_line():
    ((x, c),) = points(LINE, torch.full((20, 1), 0.5), width=1)
    assert torch.cdist(x, LINE).min() > 0.2 * (LINE[1] - LINE[0])  # never at a point of the fit
    assert len(x) == 38 and torch.cdist(x, x).fill_diagonal_(1).min() > 1e-3 and (c == 0.5).all()


@pytest.mark.parametrize("seed", range(2))
def test_no_gap_between_random_points_is_left(seed):
    line = torch.rand(60, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(dim=0).values
    ((x,),) = points(line[torch.randperm(60, generator=torch.Generator().manual_seed(seed))], width=1)
    widths = line.diff(dim=0).flatten()
    for gap in widths.topk(40).indices:
        assert ((x > line[gap] + 0.2 * widths[gap]) & (x < line[gap + 1] - 0.2 * widths[gap])).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smooth_data_are_interpolated(dtype):
    def source(x):
        return torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1]), x.sum(1, keepdim=True).expand(-1, 3).unsqueeze(1) ** 2

    twice = torch.cat([PLANE, PLANE[:3]]).to(dtype)  # the same place again is of no effect
    ((x, *data),) = points(twice, *source(twice), width=2)
    for found, expected in zip(data, source(x), strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found - expected).norm() < 2e-3 * expected.norm()


def test_sides_of_a_box_are_not_left():
    rim = PLANE.clone()
    rim[torch.arange(200), torch.arange(200) % 2] = torch.where(torch.arange(200) % 3 > 0, 1.0, -1.0).double()
    ((x,),) = points(rim, width=2)
    assert len(x) > 150 and (x.abs() == 1).any(dim=1).all()


@pytest.mark.parametrize(
    "rows, width",
    [
        ((PLANE, torch.rand(200, 1)), 2),  # noise
        ((PLANE, (PLANE[:, :1] > 0.2).double()), 2),  # a jump
        ((PLANE, torch.arange(200)), 2),
        ((LINE[:2],), 1),  # the ends of an interval
        ((PLANE,), 3),  # the network takes something else
    ],
    ids=["noise", "jump", "numbers", "ends", "width"],
)
def test_where_no_points_are_known(rows, width):
    assert not points(*rows, width=width)


def test_other_points_have_others_between():
    for rows in (LINE, LINE.clone(), LINE[:-1]):
        ((_, (x,), _),) = held_out_terms([(residual, (rows,), 1.0)], nn.Linear(1, 1).double()).values()
        assert len(x) == 2 * len(rows) - 2
    many = torch.linspace(-1, 1, 3000, dtype=torch.float64).unsqueeze(1)
    ((x, c),) = points(many, torch.full_like(many, 0.5), width=1)
    assert len(x) == len(c) == 1998  # between every third
