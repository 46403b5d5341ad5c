# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest

from peft_lotra.parametric.members import Member
from peft_lotra.parametric.path import Path


def line(points, log=False):
    path = Path(2, log)
    path.spread([(point,) for point in points])
    path.add(Member((p,), np.array([p, p * p]), 1.0, 0.1, 3, 0.0) for p in points)
    return path


def test_what_lies_between():
    path = line([1.0, 2.0, 3.0])
    np.testing.assert_allclose(path.vector_at((1.5,)), [1.5, 2.25])
    np.testing.assert_allclose(path.vector_at((4.0,)), [4.0, 16.0])
    np.testing.assert_allclose(path.vector_at((2.0,), without=(2.0,)), [2.0, 5.0])  # the line through the others
    assert path.is_inside((3.0,)) and not path.is_inside((3.1,)) and path.ranges() == ["1 to 3"]
    assert path.parameters == [1.0, 2.0, 3.0] and path.vectors.shape == (3, 2)
    assert not Path(3, False).vector_at((1.0,)).any()


def test_members_are_replaced_and_scaled_again():
    path = line([1.0, 2.0])
    path.add([Member((2.0,), np.array([0.0, 0.0]), 1.0, 0.1, 3, 0.0)])
    path.spread([(5.0,)])
    assert path.parameters == [1.0, 2.0] and path.places.squeeze(1).tolist() == [0.0, 0.25]
    assert not path.vectors[1].any()


@pytest.mark.parametrize("parameter", [1, 1.5, np.float32(2.0), [3.0], (4,)])
def test_points(parameter):
    assert line([1.0, 2.0]).point(parameter, 1) == (float(np.ravel(parameter)[0]),)


@pytest.mark.parametrize("parameter", ["a", None, float("inf"), (), (1.0, 2.0), object(), [[1.0]]])
def test_what_is_no_point(parameter):
    with pytest.raises(ValueError, match="1 finite numbers"):
        line([1.0, 2.0]).point(parameter, 1)
