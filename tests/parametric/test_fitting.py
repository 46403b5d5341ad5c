# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import family_problems as problems
import numpy as np
import pytest

from peft_lotra import ParametricAdapter
from peft_lotra.parametric.fitting import Fitting


@pytest.fixture(scope="module")
def base():
    return problems.pretrained()


def test_the_first_member_is_where_the_base_is(base):
    order = []

    def terms_of(c):
        order.append(c)
        return problems.terms_of(c)

    family = ParametricAdapter(base, terms_of, ranks=4)
    family.fit([2.6, 2.8, 3.0, 3.2], progress=False)
    assert order[:4] == [2.6, 2.8, 3.0, 3.2] and order[4] == 3.0  # the losses of the base, and then the first fit


def test_a_search_ends_at_the_tolerance(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=6)
    report = family.fit(between=(2.9, 3.1), tolerance=1.0, progress=False)
    assert report.largest <= 1 and 9 <= len(report) < 30
    assert max(family.predict(c).indicator for c in np.linspace(2.9, 3.1, 65)) <= 1.0
    assert not family.fit(between=(2.9, 3.1), tolerance=1.0, progress=False)


@pytest.mark.parametrize("most", [4, 10])
def test_no_more_members_than_allowed(base, most):
    family = ParametricAdapter(base, problems.terms_of, ranks=4)
    assert len(family.fit(between=(2.0, 4.0), max_members=most, progress=False)) == most


def test_a_bad_member_is_fitted_again(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=6)
    family.fit(np.linspace(2.8, 3.2, 9).tolist(), progress=False)
    member = family._path.members[4]
    bad = member._replace(vector=member.vector + 0.1, indicator=10.0)
    family._path.add([bad])
    fitting = Fitting(family.model, family._problem, family._path, None, None, {}, False)
    fitting._mend()  # only what this fit has fitted
    assert family._path.members[4].indicator == 10.0
    fitting.fits[bad.parameter] = 1
    fitting._mend()
    assert family._path.members[4].indicator < 1
