# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math
import warnings

import family_problems as problems
import numpy as np
import pytest
import torch
from torch import nn

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.parametric import estimate


BETWEEN = problems.POINTS[:-1] + 0.4 / 29.5


def held_terms_of(c):
    return [(problems.equation, (BETWEEN, torch.full_like(BETWEEN, c)))]


def values_of(model, c):
    return problems.solution(model(problems.POINTS), problems.POINTS)


@pytest.fixture(scope="module")
def base():
    return problems.pretrained()


@pytest.fixture(scope="module")
def family(base):
    """Members far apart, so that some predictions are bad."""
    family = ParametricAdapter(base, problems.terms_of, ranks=6, held_terms_of=held_terms_of, values_of=values_of)
    family.fit([2.0, 2.5, 3.0, 3.5, 4.0], progress=False)
    return family


def test_the_indicator_is_about_the_error(family):
    unseen = np.random.default_rng(0).uniform(2, 4, 12)
    predictions = [family.predict(c) for c in unseen]
    ratios = [p.indicator / problems.error(p, c) for p, c in zip(predictions, unseen, strict=True)]
    assert 0.2 < min(ratios) and max(ratios) < 6 and 0.6 < np.median(ratios) < 1.6
    assert len(family._estimates._known) <= 5  # one linearization near each member


def test_an_extrapolation_has_a_large_indicator(family):
    forced = family.predict(4.6, force=True)
    assert 1 / 5 < forced.indicator / problems.error(forced, 4.6) < 5
    assert forced.residual > 5 * family.predict(3.9).residual


def test_no_state_is_left_in_the_model(family):
    before, first = copy.deepcopy(family.model.state_dict()), family.predict(2.3)
    values = first(problems.POINTS)
    assert first.indicator > 0 and torch.equal(first(problems.POINTS), values)
    after = family.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "lotra_core" not in name)


def test_values_may_be_many_and_modes_are_of_no_effect(family, base):
    def many(model, c):
        x = torch.linspace(-1, 1, 999, dtype=torch.float64).unsqueeze(1)
        return problems.solution(model(x), x)

    other = ParametricAdapter(base, problems.terms_of, ranks=6, held_terms_of=held_terms_of, values_of=many)
    other.fit([2.0, 2.5, 3.0, 3.5, 4.0], progress=False)
    with torch.inference_mode():
        sketched = other.predict(2.2).indicator
    assert sketched == pytest.approx(family.predict(2.2).indicator, rel=0.4)


def test_a_network_too_large_for_a_step_is_stepped_in_coordinates(family, monkeypatch):
    monkeypatch.setattr(estimate, "MEMORY", 4 * 8 * 60 * 119)
    other = copy.deepcopy(family)
    other._estimates._known.clear()
    assert 0.1 * family.predict(2.2).indicator < other.predict(2.2).indicator < 10 * family.predict(2.2).indicator


def test_points_that_change_with_the_parameter(base):
    def terms_of(c):
        x = torch.linspace(-1, 1, 60 if c == 3.0 else 70, dtype=torch.float64).unsqueeze(1)
        return [(problems.equation, (x, torch.full_like(x, c)))]

    family = ParametricAdapter(base, terms_of, ranks=4, values_of=values_of)
    family.fit([2.8, 3.0, 3.2], progress=False)
    assert 0 < family.predict(3.02).indicator < 1


def test_rows_may_come_in_any_order(base):
    def swapped(model, c, x):
        return problems.equation(model, x, c[:, :1])

    def terms_of(c):
        x = problems.POINTS
        return [(swapped, (torch.full((len(x), 3), c, dtype=x.dtype), x))]

    family = ParametricAdapter(base, terms_of, ranks=4)
    usual = ParametricAdapter(base, problems.terms_of, ranks=4)
    for one in (family, usual):
        one.fit([2.9, 3.0], progress=False)
    assert family.predict(2.95).indicator == pytest.approx(usual.predict(2.95).indicator, rel=1e-6)


def test_rows_that_the_model_does_not_take_leave_the_residual(base):
    def of_powers(model, powers, c):
        return problems.equation(model, powers[:, :1], c)

    def terms_of(c):
        x = problems.POINTS
        return [(of_powers, (torch.cat([x, x**2], dim=1), torch.full_like(x, c)))]

    family = ParametricAdapter(base, terms_of, ranks=4)
    family.fit([2.9, 3.0], progress=False)
    prediction = family.predict(2.95)
    with pytest.warns(UserWarning, match="nothing is known between"):
        assert prediction.indicator == prediction.residual


def test_few_points_do_not_hide_the_error():
    """Members that fit each of 40 points, and are wrong between them."""
    x = torch.rand(40, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1

    def terms_of(c):
        return [(problems.equation, (x, torch.full_like(x, c)))]

    torch.manual_seed(0)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    LevenbergMarquardt(base, floor=1e-6).fit(terms_of(3.0), 25, progress=False)
    family = ParametricAdapter(base, terms_of, ranks=6, values_of=values_of)
    family.fit([2.6, 2.8, 3.0, 3.2], progress=False)
    prediction = family.predict(2.9)
    assert 0.3 < prediction.indicator / problems.error(prediction, 2.9) < 3


def screened(model, x, c, source):
    """-c u'' + u = f for u = (1 - x^2) N, with f as a row."""
    n, (slope,), second = jet(model, x, collapse=True)
    return -c * ((1 - x**2) * second - 4 * x * slope - 2 * n) + (1 - x**2) * n - source


def test_random_points_and_data_do_not_hide_the_error():
    """60 random points with wide gaps, and fewer of them than parameters; the right-hand side comes as a row."""
    x = torch.rand(60, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1

    def terms_of(c):
        return [(screened, (x, torch.full_like(x, c), torch.cos(math.pi / 2 * x)))]

    torch.manual_seed(0)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    LevenbergMarquardt(base, floor=1e-6).fit(terms_of(0.1), 25, progress=False)
    family = ParametricAdapter(base, terms_of, ranks=6, values_of=values_of, log=True)
    family.fit([0.03, 0.06, 0.12, 0.3], progress=False)
    unseen = np.geomspace(0.031, 0.29, 20)
    predictions = [family.predict(float(c)) for c in unseen]
    grid = problems.POINTS
    exact = [torch.cos(math.pi / 2 * grid) / (1 + c * math.pi**2 / 4) for c in unseen]
    errors = [
        ((problems.solution(p(grid), grid) - u).norm() / u.norm()).item()
        for p, u in zip(predictions, exact, strict=True)
    ]
    indicators = [p.indicator for p in predictions]
    assert np.corrcoef(np.argsort(np.argsort(errors)), np.argsort(np.argsort(indicators)))[0, 1] > 0.8
    assert 0.5 < np.median(np.array(indicators) / errors) < 2


def test_blind_indicators_warn_once():
    def noisy(model, x, c, data):
        return problems.equation(model, x, c) + data

    data = torch.randn(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def terms_of(c):
        return [(noisy, (problems.POINTS, torch.full_like(problems.POINTS, c), data))]

    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    family, told = (ParametricAdapter(base, terms_of, ranks=4, held_terms_of=held) for held in (None, held_terms_of))
    for one in (family, told):
        one.fit([2.5, 3.0], progress=False)
    with pytest.warns(UserWarning, match="80 parameters can fit each of its 60 residuals.*`held_terms_of`") as warned:
        assert family.predict(2.6).indicator > 0 and family.predict(2.9).indicator > 0
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told.predict(2.6).indicator > 0


def test_a_float32_model_of_ones_own(base):
    class Solution(nn.Module):
        def __init__(self):
            super().__init__()
            self.kan, self.scale = KAN([1, 4, 1]), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * (1 - x**2) * self.kan(x)

    def equation(model, x, c):
        return jet(model.kan, x)[0] * (1 - x**2) - torch.sin(c * x) * (1 - x**2)

    def terms_of(c):
        x = problems.POINTS.float()
        return [(equation, (x, torch.full_like(x, c)))]

    family = ParametricAdapter(Solution(), terms_of, ranks=4)
    family.fit([2.0, 2.5, 3.0], progress=False)
    assert 0 < family.predict(2.25).indicator < 1


def test_functions_that_fail_are_not_hidden(base):
    def wrong(model, c):
        raise ZeroDivisionError("no values")

    family = ParametricAdapter(base, problems.terms_of, ranks=4, values_of=wrong)
    family.fit([2.9, 3.0], progress=False)
    with pytest.raises(ZeroDivisionError, match="no values"):
        _ = family.predict(2.95).indicator
    with pytest.raises(TypeError, match="`held_terms_of` is a list"):
        ParametricAdapter(base, problems.terms_of, held_terms_of=[])
