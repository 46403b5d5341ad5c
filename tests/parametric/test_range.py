# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The parameters that a fit chooses in a range."""

import itertools

import family_problems as problems
import numpy as np
import pytest

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN


def test_a_search_ends_at_the_tolerance(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=6)

    report = family.fit(between=(2.9, 3.1), tolerance=1.0, progress=False)

    assert 9 <= len(report) < 30
    assert report.largest <= 1
    assert "in the range" in str(report)
    assert max(family.predict(c).residual for c in np.linspace(2.9, 3.1, 33)) <= 1.0
    assert not family.fit(between=(2.9, 3.1), tolerance=1.0, progress=False)


def chosen(loss_of, max_members, low=0.0, high=1.0):
    """Return the parameters that a search chooses by given losses, without training."""
    family = ParametricAdapter(KAN([1, 2, 1]), ranks=2, loss_of=lambda model, c: loss_of(c))
    options = {"train": lambda *_: None, "max_members": max_members, "progress": False}
    family.fit(between=(low, high), tolerance=1.0, **options)
    return family.parameters


@pytest.mark.parametrize("max_members", [2, 4, 12])
def test_no_more_members_than_allowed(max_members):
    parameters = chosen(lambda c: 2.0, max_members)

    assert len(parameters) == max_members
    assert parameters[0] == 0.0
    assert parameters[-1] == 1.0


def test_members_are_added_where_predictions_are_worst():
    def loss_of(c):
        return 9 - 10 * c if c < 0.4 else 0.5

    parameters = chosen(loss_of, 12)

    assert set(parameters) - set(np.linspace(0, 1, 9)) == {0.0625, 0.1875, 0.3125}


def test_a_search_starts_at_the_corners_of_a_range_of_several_parameters():
    corners = list(itertools.product((0.0, 1.0), (0.0, 1.0), (1.0, 2.0)))

    assert chosen(lambda c: 0.5, 8, (0.0, 0.0, 1.0), (1.0, 1.0, 2.0)) == corners
    assert len(chosen(lambda c: 0.5, 9, (0.0, 0.0), (1.0, 1.0))) == 9
