# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.parametric import between
from peft_lotra.parametric.between import PointsBetween, inputs_of


def residual(model, *rows):
    return rows[0]


def takes(count):
    return lambda inputs: inputs.dim() == 2 and inputs.shape[1] == count


LINE = torch.linspace(-1, 1, 20, dtype=torch.float64).unsqueeze(1)
PLANE = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
PARAMETER = torch.full((200, 1), 0.5)


def points(*rows, width):
    found = PointsBetween().of([(residual, rows, 3.0)], takes(width))
    assert all(function is residual and weight == 3.0 for function, _, weight in found)
    return [rows for _, rows, _ in found]


def test_between_neighbors_on_a_line():
    ((x, c),) = points(LINE, torch.full((20, 1), 0.5), width=1)
    assert torch.cdist(x, LINE).min() > 0.2 * (LINE[1] - LINE[0])  # never at a point of the fit
    assert len(x) == 38 and torch.cdist(x, x).fill_diagonal_(1).min() > 1e-3 and (c == 0.5).all()


@pytest.mark.parametrize("seed", range(5))
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


@pytest.mark.parametrize("rows", [(PLANE, PARAMETER), (PLANE[:, :1], PLANE[:, 1:], PARAMETER), (PARAMETER, PLANE)])
def test_points_of_a_plane_may_be_one_tensor_or_two_and_anywhere(rows):
    inputs, _ = inputs_of(rows, takes(2))
    assert torch.equal(inputs, PLANE)
    ((*new,),) = points(*rows, width=2)
    inputs, _ = inputs_of(new, takes(2))
    assert torch.cdist(inputs, PLANE).min(dim=1).values.min() > 1e-4 and inputs.abs().max() < 1


def test_a_column_of_numbers_and_other_shapes():
    inputs, used = inputs_of((LINE.squeeze(1), torch.zeros(20)), takes(1))
    assert torch.equal(inputs, LINE) and used == [0]
    images = torch.rand(20, 1, 4, 4)
    assert inputs_of((images,), lambda x: x.dim() == 4)[0].shape == images.shape
    assert inputs_of((torch.arange(20),), takes(1)) is None
    constant = torch.ones(20, 1)
    assert torch.equal(inputs_of((constant, constant), takes(1))[0], constant.double())


def test_sides_of_a_box_are_not_left():
    rim = PLANE.clone()
    rim[torch.arange(200), torch.arange(200) % 2] = torch.where(torch.arange(200) % 3 > 0, 1.0, -1.0).double()
    ((x,),) = points(rim, width=2)
    assert len(x) > 150 and (x.abs() == 1).any(dim=1).all()


@pytest.mark.parametrize("side", [3, 30])
def test_points_of_a_grid(side):
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    found = points(torch.cartesian_prod(axis, axis), width=2)
    assert len(found) == (side > 3)  # each coordinate of a coarse one looks like a side


@pytest.mark.parametrize(
    "rows, width",
    [
        ((PLANE, torch.rand(200, 1)), 2),  # noise
        ((PLANE, (PLANE[:, :1] > 0.2).double()), 2),  # a jump
        ((PLANE, torch.arange(200)), 2),
        ((LINE[:2],), 1),  # the ends of an interval
        ((PLANE,), 3),  # the network takes something else
        ((torch.rand(20, 1, 4, 4),), 16),
    ],
)
def test_where_no_points_are_known(rows, width):
    assert not points(*rows, width=width)


def test_many_points_have_fewer_between(monkeypatch):
    monkeypatch.setattr(between, "MOST", 50)
    ((x, c),) = points(PLANE, PARAMETER, width=2)
    assert 50 < len(x) == len(c) <= 150


def test_neighbors_are_searched_once_and_again_for_other_points(monkeypatch):
    calls = []
    search = between._find_gaps
    monkeypatch.setattr(between, "_find_gaps", lambda inputs: calls.append(1) or search(inputs))
    known = PointsBetween()
    for rows in (LINE, LINE.clone(), LINE[:-1]):
        known.of([(residual, (rows,), 1.0)], takes(1))
    assert len(calls) == 2
