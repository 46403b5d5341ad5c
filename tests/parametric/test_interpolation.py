# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_lotra.parametric.interpolation import MemberSpace, is_inside, weights_at
from peft_lotra.parametric.members import Member


def places(count, dim, seed=0):
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_polynomials_are_reproduced_inside_and_outside(dim):
    points = places(12, dim)
    values = 1 + points.sum(1) - 2 * points[:, 0] * points[:, -1]
    for at in (points.mean(0), torch.full((dim,), 1.3, dtype=torch.float64)):
        assert weights_at(points, at) @ values == pytest.approx((1 + at.sum() - 2 * at[0] * at[-1]).item(), abs=1e-9)


@pytest.mark.parametrize("dim, count", [(1, 1), (1, 2), (1, 3), (1, 9), (2, 1), (2, 3), (2, 5), (2, 14), (3, 7)])
def test_points_themselves_have_their_own_values(dim, count):
    points = places(count, dim)
    for index, point in enumerate(points):
        torch.testing.assert_close(weights_at(points, point), torch.eye(count).double()[index], atol=1e-9, rtol=0)


def test_a_smooth_function_is_interpolated_to_high_order():
    errors = []
    for count in (9, 17):
        points = torch.linspace(0, 1, count).double().unsqueeze(1)
        at = points[:2].mean(0) + points[count // 2] - points[0]
        errors.append(abs(weights_at(points, at) @ torch.sin(3 * points[:, 0]) - torch.sin(3 * at[0])).item())
    assert errors[0] < 1e-4 and errors[1] < errors[0] / 10


def test_the_hull():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for at, expected in (([0.3, 0.3], True), ([0.5, 0.5], True), ([0.6, 0.6], False), ([-0.01, 0.5], False)):
        assert is_inside(square, torch.tensor(at, dtype=torch.float64)) is expected
    line = torch.tensor([[0.2], [0.8]], dtype=torch.float64)
    assert is_inside(line, line[0]) and is_inside(line, line[1]) and not is_inside(line, line[1] + 1e-6)


def space_of(*members, log=False):
    space = MemberSpace(2, log)
    space.spread([point for point, _ in members])
    space.add(Member(point, np.array(vector), 1.0, 0.1, 3, 0.0) for point, vector in members)
    return space


def test_places_in_a_range():
    space = MemberSpace(2, [True, False])
    space.spread([(0.01, -1.0), (1.0, 1.0)])
    torch.testing.assert_close(space.places_of([(0.1, 0.0)]), torch.full((1, 2), 0.5, dtype=torch.float64))
    assert space.points_at(torch.tensor([[0.5, 0.5]]).double())[0] == pytest.approx((0.1, 0.0))
    assert space_of(((2.0,), [0.0, 0.0])).places.tolist() == [[0.0]]  # a range of one parameter


def test_coordinates_between_and_outside_of_members():
    space = space_of(*(((c,), [c, c * c]) for c in (1.0, 2.0, 3.0)))
    np.testing.assert_allclose(space.vector_at((1.5,)), [1.5, 2.25])
    np.testing.assert_allclose(space.vector_at((4.0,)), [4.0, 16.0])
    np.testing.assert_allclose(space.vector_at((2.0,), without=(2.0,)), [2.0, 5.0])  # the line through the others
    assert space.is_inside((3.0,)) and not space.is_inside((3.1,)) and space.nearest((2.6,)).parameter == (3.0,)
    assert not MemberSpace(3, False).vector_at((1.0,)).any()


@pytest.mark.parametrize("parameter", [1, 1.5, np.float32(2.0), [3.0], (4,), torch.tensor(2.5)])
def test_points(parameter):
    space = space_of(((1.0,), [0.0, 0.0]))
    assert space.point(parameter) == (float(np.ravel(parameter)[0]),)
    for wrong in (None, float("inf"), (), (1.0, 2.0)):
        with pytest.raises(ValueError, match="1 finite numbers"):
            space.point(wrong)
