# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Estimates of the errors of predictions."""

from __future__ import annotations

import math
import warnings
from functools import partial

import family_problems as problems
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt


BETWEEN = problems.POINTS[:-1] + 0.4 / 29.5
GRID = problems.POINTS


def held_terms_of(c):
    return [(problems.equation, (BETWEEN, torch.full_like(BETWEEN, c)))]


def values_of(model, c):
    return problems.solution(model(GRID), GRID)


def random_points(count):
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1


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
    unseen = np.random.default_rng(0).uniform(2, 4, 12)
    predictions = [family.predict(c) for c in unseen]
    ratios = [p.indicator / problems.error(p, c) for p, c in zip(predictions, unseen, strict=True)]
    assert 0.2 < min(ratios) and max(ratios) < 6 and 0.6 < np.median(ratios) < 1.6


def together(model, x, c):
    return model(x) - torch.sin(c * x).sum(1, keepdim=True)


def test_inputs_may_come_in_one_tensor_or_two_and_in_any_order():
    plane = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    x, y = plane.split(1, dim=1)

    def terms_of(c, order):
        c = torch.full((200, 1), c, dtype=torch.float64)
        functions = {
            "one": (together, (plane, c)),
            "two": (lambda model, x, y, c: together(model, torch.cat([x, y], dim=1), c), (x, y, c)),
            "last": (lambda model, c, x: together(model, x, c), (c, plane)),
        }
        return [functions[order]]

    base, found = KAN([2, 4, 1], dtype=torch.float64), []
    for order in ("one", "two", "last"):
        family = ParametricAdapter(base, partial(terms_of, order=order), ranks=4)
        family.fit([1.0, 2.0], progress=False)
        prediction = family.predict(1.4)
        found.append(prediction.indicator)
        assert prediction.indicator != prediction.residual
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-4)


def test_the_residual_is_the_root_of_the_loss(base):
    def terms_of(c):
        return [*problems.terms_of(c), (lambda model, x: model(x), GRID, 0.3)]

    family = ParametricAdapter(base, terms_of, ranks=4)
    family.fit([2.9, 3.0], progress=False)
    prediction = family.predict(2.95)
    (equation, rows), (values, x, _) = terms_of(2.95)
    first, second = prediction.apply(equation, *rows), prediction.apply(values, x)
    loss = first.square().mean() + 0.3 * second.square().mean()
    assert prediction.residual**2 == pytest.approx(loss.item(), rel=1e-9)


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
    """-c u'' + u = f for u = (1 - x^2) N, with f as a row."""
    n, (slope,), second = jet(model, x, collapse=True)
    return -c * ((1 - x**2) * second - 4 * x * slope - 2 * n) + (1 - x**2) * n - source


def test_random_points_and_data_do_not_hide_the_error():
    """60 random points with wide gaps, and fewer of them than parameters; the right-hand side comes as a row.

    Errors of one base may be alike, and of five they are not.
    """
    x = random_points(60)

    def terms_of(c):
        return [(screened, (x, torch.full_like(x, c), torch.cos(math.pi / 2 * x)))]

    errors, indicators = [], []
    for seed in range(5):
        family = ParametricAdapter(trained(terms_of(0.1), seed), terms_of, ranks=6, values_of=values_of, log=True)
        family.fit([0.03, 0.06, 0.12, 0.3], progress=False)
        for c in np.geomspace(0.031, 0.29, 20):
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
    middle = 2.25
    before, after = (family.predict(middle + distance).indicator for distance in (-1e-6, 1e-6))

    assert after == pytest.approx(before, rel=1e-3)


def test_blind_indicators_warn():
    def noisy(model, x, c, data):
        return problems.equation(model, x, c) + data

    data = torch.randn(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def terms_of(c):
        return [(noisy, (GRID, torch.full_like(GRID, c), data))]

    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    family, told = (ParametricAdapter(base, terms_of, ranks=4, held_terms_of=held) for held in (None, held_terms_of))
    for one in (family, told):
        one.fit([2.5, 3.0], progress=False)
    with pytest.warns(UserWarning, match="80 parameters can fit each of its 60 residuals.*`held_terms_of`") as warned:
        assert family.predict(2.6).indicator > 0 and family.predict(2.7).indicator > 0
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told.predict(2.6).indicator > 0


def test_data_that_are_smooth_at_some_parameters_alone():
    """At 3 the data change too fast to be interpolated between the points, at 1 they do not."""

    def fitted(model, x, data):
        return model(x) - data

    plane = torch.rand(150, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1

    def terms_of(c):
        return [(fitted, (plane, torch.sin(c * plane[:, :1]) * torch.cos(2 * plane[:, 1:])))]

    torch.manual_seed(0)
    family = ParametricAdapter(KAN([2, 5, 1], 5, dtype=torch.float64), terms_of, ranks=4)
    family.fit([1.0, 1.5, 2.0, 2.5, 3.0], max_steps=5, progress=False)

    assert all(0 < family.predict(c).indicator < 10 for c in np.linspace(1.05, 2.95, 8))
