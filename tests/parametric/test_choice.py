# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools

import pytest
import torch

from peft_lotra.parametric.choice import STRIDE, blended, candidates, greedy_batch, next_wave, skeleton


def walk(points, start):
    """The waves in which all points are fitted."""
    pending, members, waves = list(range(len(points))), torch.empty(0, points.shape[1]).double(), []
    while pending:
        first = pending.index(start) if start in pending else 0
        wave = [pending[i] for i in next_wave(points[pending], members, first)]
        assert wave
        waves.append(wave)
        members = torch.cat([members, points[wave]])
        pending = [index for index in pending if index not in wave]
    return waves


def test_a_hundred_parameters_take_few_waves():
    points = torch.linspace(0, 1, 100).double().unsqueeze(1)
    waves = walk(points, 50)
    assert waves[0] == [50] and sorted(sum(waves, [])) == list(range(100))
    assert len(waves) <= 8 and len(waves[-1]) > 80
    members = points[waves[0]]
    for wave in waves[1:-1]:  # no stride is longer than allowed
        assert torch.cdist(points[wave], members).min(dim=1).values.max() <= STRIDE * (1 + 1e-6)
        members = torch.cat([members, points[wave]])


def test_sparse_parameters_are_taken_one_after_the_other_outward():
    points = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64).unsqueeze(1)
    assert walk(points, 2) == [[2], [1], [0], [3], [4]]


@pytest.mark.parametrize("dim", [2, 3])
def test_a_box(dim):
    points = skeleton(dim, 64)
    assert {tuple(map(float, point)) for point in points} >= {(0.0,) * dim, (1.0,) * dim}
    assert sorted(sum(walk(points, len(points) // 2), [])) == list(range(len(points)))


@pytest.mark.parametrize(
    "dim, most, count", [(1, 64, 9), (1, 4, 4), (1, 2, 2), (2, 9, 9), (2, 8, 4), (3, 9, 9), (3, 8, 8)]
)
def test_a_box_of_few_members_has_its_corners(dim, most, count):
    points = {tuple(map(float, point)) for point in skeleton(dim, most)}
    assert len(points) == count and points >= set(itertools.product((0.0, 1.0), repeat=dim))


def test_the_worst_come_first_and_apart():
    places = torch.linspace(0, 1, 9).double().unsqueeze(1)
    members = places[[0, 4, 8]]
    shares = torch.tensor([9, 2, 3, 2, 9, 1.5, 4, 1.5, 9], dtype=torch.float64)  # members themselves do not count
    assert greedy_batch(places, shares, members, 1.1) == [6, 2]
    assert greedy_batch(places, shares, members, 3.5) == [6]
    assert greedy_batch(places, shares, members, 5.0) == []


def test_values_between_members_are_blended():
    members = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    values = blended(torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64), members, torch.tensor([1.0, 100.0]))
    torch.testing.assert_close(values, torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert blended(members, members[:1], torch.tensor([2.0])).tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_candidates_lie_in_the_cube(dim):
    points = candidates(dim)
    assert points.shape[1] == dim and len(points) >= 64 and points.min() >= 0 and points.max() <= 1
    assert torch.equal(points, candidates(dim))
