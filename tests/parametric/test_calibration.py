# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Parameters of a family from noisy data."""

from __future__ import annotations

import family_problems as problems
import numpy as np
import pytest
import torch

from peft_lotra import ParametricAdapter


X = problems.POINTS
NOISE = 0.02


@pytest.fixture(scope="module")
def family(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=6, log=True)
    family.fit(np.geomspace(2.5, 3.5, 7).tolist(), progress=False)
    return family


def terms_of_product(parameter):
    a, b = parameter
    return problems.terms_of_two((3.0, a * b))


def noisy(c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return problems.exact(c) + NOISE * torch.randn(X.shape, generator=generator, dtype=torch.float64)


def residuals(data):
    return lambda model: problems.solution(model(X), X) - data


def test_intervals_cover_the_truth(family):
    found = []
    truths = np.random.default_rng(0).uniform(2.6, 3.4, 30).tolist()
    for seed, c in enumerate(truths):
        one = family.calibrate(residuals(noisy(c, seed)))
        found.append(abs(one.parameter - c) < 1.96 * one.error)
        assert one.covariance == pytest.approx(np.array([[one.error**2]])) and one.noise == pytest.approx(
            NOISE, rel=0.5
        )
    assert sum(found) >= 25  # 28 or 29 are expected


def test_the_result_is_the_least_sum_of_squares(family):
    data = noisy(2.9)
    one = family.calibrate(residuals(data))
    line = np.linspace(one.parameter - 0.05, one.parameter + 0.05, 41)
    losses = [residuals(data)(family.predict(c)).square().sum().item() for c in line]
    assert line[np.argmin(losses)] == pytest.approx(one.parameter, abs=0.003)
    curvature = np.polyfit(line - one.parameter, losses, 2)[0]  # of the loss: that of Laplace's approximation
    assert one.error == pytest.approx(one.noise / curvature**0.5, rel=0.1)
    torch.testing.assert_close(one.prediction(X), family.predict(one.parameter)(X))


def test_two_parameters(base):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=6)
    family.fit([(c, a) for c in (2.8, 3.0, 3.2) for a in (0.9, 1.1)], max_steps=6, progress=False)
    data = 1.07 * noisy(2.9)
    one = family.calibrate(residuals(data))
    assert one.parameter == pytest.approx((2.9, 1.07), abs=0.1) and len(one.error) == 2
    assert one.covariance.shape == (2, 2) and one.covariance[0, 1] == pytest.approx(one.covariance[1, 0])


def test_parameters_that_data_cannot_tell_apart(base):
    """Two parameters of which the solution knows the product alone."""
    family = ParametricAdapter(base, terms_of_product, ranks=6)
    family.fit([(a, b) for a in (0.8, 1.2) for b in (0.8, 1.2)], max_steps=6, progress=False)
    with pytest.raises(ValueError, match="along the direction") as error:
        family.calibrate(residuals(noisy(3.0)))
    first, second = map(float, str(error.value).partition("direction (")[2].partition(")")[0].split(", "))
    assert first * second < 0  # one up, the other down


def test_data_that_do_not_determine_the_parameter(family):
    with pytest.raises(ValueError, match="do not determine the parameter"):
        family.calibrate(lambda model: 0 * model(X) - noisy(3.0))
    for c in (2.2, 4.0):
        with pytest.raises(ValueError, match="outside of the fitted members"):
            family.calibrate(residuals(noisy(c)))
    assert family.calibrate(residuals(noisy(3.49))).parameter <= 3.5


@pytest.mark.parametrize(
    "function, message",
    [
        (residuals(noisy(3.0).flatten()), r"\(60, 60\): values \(n, 1\) minus data"),
        (residuals(noisy(3.0) * torch.nan), "not finite in the initial point"),
        (lambda model: model(X)[:1] - 1.0, r"shape \(1, 1\), but must return a tensor with more than 1"),
        (lambda model: 0.0, "a float, but must return a tensor"),
    ],
    ids=["all pairs", "NaN", "one", "float"],
)
def test_wrong_residuals(family, function, message):
    with pytest.raises(ValueError, match=message):
        family.calibrate(function)


def test_wrong_calls(family, base):
    with pytest.raises(TypeError, match="`residuals` is"):
        family.calibrate(noisy(3.0))
    with pytest.raises(ValueError, match="no members yet"):
        ParametricAdapter(base, problems.terms_of).calibrate(residuals(noisy(3.0)))
