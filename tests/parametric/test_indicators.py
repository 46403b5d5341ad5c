# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Estimates of the errors of predictions."""

import math
import warnings

import family_problems as problems
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


BETWEEN = problems.POINTS[:-1] + 0.4 / 29.5
GRID = problems.POINTS


def held_terms_of(c):
    return [(problems.equation, (BETWEEN, torch.full_like(BETWEEN, c)))]


def values_of(model, c):
    return problems.solution(model(GRID), GRID)


def random_points(count, dim=1):
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1


def trained(terms, seed):
    torch.manual_seed(seed)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    LevenbergMarquardt(base, floor=1e-6).fit(terms, 25, progress=False)
    return base


@pytest.fixture(scope="module")
def family(base):
    """Members far apart, so that some predictions are bad."""
    family = ParametricAdapter(base, problems.terms_of, ranks=6, held_terms_of=held_terms_of, values_of=values_of)
    family.fit([2.0, 2.5, 3.0, 3.5, 4.0], progress=False)
    return family


def test_the_indicator_is_about_the_error(family):
    parameters = np.random.default_rng(0).uniform(2, 4, 12)

    ratios = []
    for c in parameters:
        prediction = family.predict(c)
        ratios.append(prediction.indicator / problems.error(prediction, c))

    assert min(ratios) > 0.2
    assert max(ratios) < 6
    assert 0.6 < np.median(ratios) < 1.6


def together(model, x, c):
    return model(x) - torch.sin(c * x).sum(1, keepdim=True)


def test_inputs_may_come_in_one_tensor_or_two_and_in_any_order():
    plane = random_points(200, 2)
    x, y = plane.split(1, dim=1)
    base = KAN([2, 4, 1], dtype=torch.float64)

    def two_tensors(model, x, y, c):
        return together(model, torch.cat([x, y], dim=1), c)

    def parameter_first(model, c, x):
        return together(model, x, c)

    def indicator(function, rows_of):
        def terms_of(c):
            return [(function, rows_of(torch.full((200, 1), c, dtype=torch.float64)))]

        family = ParametricAdapter(base, terms_of, ranks=4)
        family.fit([1.0, 2.0], progress=False)
        prediction = family.predict(1.4)
        assert prediction.indicator != prediction.residual
        return prediction.indicator

    expected = indicator(together, lambda c: (plane, c))

    assert indicator(two_tensors, lambda c: (x, y, c)) == pytest.approx(expected, rel=1e-4)
    assert indicator(parameter_first, lambda c: (c, plane)) == pytest.approx(expected, rel=1e-4)


def test_the_residual_is_the_root_of_the_loss(base):
    def terms_of(c):
        return [*problems.terms_of(c), (lambda model, x: model(x), GRID, 0.3)]

    family = ParametricAdapter(base, terms_of, ranks=4)
    family.fit([2.9, 3.0], progress=False)

    prediction = family.predict(2.95)

    (equation, rows), (values, x, _) = terms_of(2.95)
    first = prediction.apply(equation, *rows).square().mean().item()
    second = prediction.apply(values, x).square().mean().item()
    assert prediction.residual**2 == pytest.approx(first + 0.3 * second, rel=1e-9)


def test_rows_that_the_model_does_not_take_leave_the_residual(base):
    def of_powers(model, powers, c):
        return problems.equation(model, powers[:, :1], c)

    def terms_of(c):
        return [(of_powers, (torch.cat([GRID, GRID**2], dim=1), torch.full_like(GRID, c)))]

    family = ParametricAdapter(base, terms_of, ranks=4)
    family.fit([2.9, 3.0], progress=False)
    prediction = family.predict(2.95)

    with pytest.warns(UserWarning, match="nothing is known between"):
        assert prediction.indicator == prediction.residual


def screened(model, x, c, source):
    """Return the residual of -c u'' + u = f for u = (1 - x^2) N, with f as a row."""
    n, (slope,), second = jet(model, x, collapse=True)
    return -c * ((1 - x**2) * second - 4 * x * slope - 2 * n) + (1 - x**2) * n - source


def test_random_points_and_data_do_not_hide_the_error():
    """The 60 random points have wide gaps and are fewer than the parameters; the right-hand side is a row.

    Errors of one base may be alike, so there are three bases.
    """
    x = random_points(60)

    def terms_of(c):
        return [(screened, (x, torch.full_like(x, c), torch.cos(math.pi / 2 * x)))]

    errors, indicators = [], []
    for seed in range(3):
        family = ParametricAdapter(trained(terms_of(0.1), seed), terms_of, ranks=6, values_of=values_of, log=True)
        family.fit([0.03, 0.06, 0.12, 0.3], progress=False)
        for c in np.geomspace(0.031, 0.29, 16):
            prediction = family.predict(float(c))
            exact = torch.cos(math.pi / 2 * GRID) / (1 + c * math.pi**2 / 4)
            difference = problems.solution(prediction(GRID), GRID) - exact
            errors.append((difference.norm() / exact.norm()).item())
            indicators.append(prediction.indicator)

    ratios = np.array(indicators) / errors
    assert spearmanr(errors, indicators)[0] > 0.75
    assert 0.7 < np.median(ratios) < 1.4
    assert np.mean((0.5 < ratios) & (ratios < 2)) > 0.75


def test_indicators_do_not_jump_where_another_member_becomes_the_nearest(family):
    """The members are at 2 and 2.5."""
    left = family.predict(2.25 - 1e-6).indicator
    right = family.predict(2.25 + 1e-6).indicator

    assert left == pytest.approx(right, rel=1e-3)


def test_blind_indicators_warn():
    def noisy(model, x, c, data):
        return problems.equation(model, x, c) + data

    data = torch.randn(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def terms_of(c):
        return [(noisy, (GRID, torch.full_like(GRID, c), data))]

    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    blind = ParametricAdapter(base, terms_of, ranks=4)
    seeing = ParametricAdapter(base, terms_of, ranks=4, held_terms_of=held_terms_of)
    for family in (blind, seeing):
        family.fit([2.5, 3.0], progress=False)

    with pytest.warns(UserWarning, match="80 parameters can fit each of its 60 residuals.*`held_terms_of`") as records:
        assert blind.predict(2.6).indicator > 0
        assert blind.predict(2.7).indicator > 0

    assert len(records) == 1
    assert records[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seeing.predict(2.6).indicator > 0


def test_data_may_be_smooth_at_some_parameters_only():
    """At 1 the data can be interpolated between the points, at 3 they change too fast."""

    def fitted(model, x, data):
        return model(x) - data

    plane = random_points(150, 2)

    def terms_of(c):
        return [(fitted, (plane, torch.sin(c * plane[:, :1]) * torch.cos(2 * plane[:, 1:])))]

    torch.manual_seed(0)
    family = ParametricAdapter(KAN([2, 5, 1], 5, dtype=torch.float64), terms_of, ranks=4)
    family.fit([1.0, 1.5, 2.0, 2.5, 3.0], max_steps=5, progress=False)

    assert all(0 < family.predict(c).indicator < 10 for c in np.linspace(1.05, 2.95, 8))
