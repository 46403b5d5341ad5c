# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Parameters of a family from noisy data."""

import itertools
import re

import family_problems as problems
import numpy as np
import pytest
import torch
from helpers import refused

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


def noisy(c, seed=0, noise=NOISE):
    generator = torch.Generator().manual_seed(seed)
    return problems.exact(c) + noise * torch.randn(X.shape, generator=generator, dtype=torch.float64)


def residuals(data):
    return lambda model: problems.solution(model(X), X) - data


def test_intervals_cover_the_truth(family):
    parameters = np.random.default_rng(0).uniform(2.6, 3.4, 30).tolist()

    covered = 0
    for seed, c in enumerate(parameters):
        result = family.calibrate(residuals(noisy(c, seed)))
        covered += abs(result.parameter - c) < 1.96 * result.error
        assert result.covariance == pytest.approx(np.array([[result.error**2]]))
        assert result.noise == pytest.approx(NOISE, rel=0.5)

    assert covered >= 25  # 28 or 29 are expected


@pytest.fixture(scope="module")
def coarse(base):
    """A family of few members, whose error is 0.007."""
    family = ParametricAdapter(base, problems.terms_of, ranks=6)
    family.fit([2.5, 3.0, 3.5], progress=False)
    return family


@pytest.mark.filterwarnings("ignore:The family's own error")
@pytest.mark.parametrize("dim", [1, 2])
def test_intervals_of_a_coarse_family_cover_the_truth(base, coarse, dim):
    """The noise is as large as the error of the family, which moves all data together."""
    family, size = coarse, 1.0
    if dim == 2:
        family, size = ParametricAdapter(base, problems.terms_of_two, ranks=6), 1.1
        family.fit(itertools.product((2.6, 3.0, 3.4), (0.8, 1.2)), max_steps=6, progress=False)

    covered = np.zeros(dim)
    for seed, c in enumerate(np.linspace(2.65, 3.35, 10).tolist()):
        result = family.calibrate(residuals(size * noisy(c, seed, noise=0.006)))
        covered += abs(np.subtract(result.parameter, (c, size)[:dim])) < 1.96 * np.array(result.error)
        assert np.max(result.error) < 0.05

    assert covered.min() >= 9


def test_a_family_whose_error_dominates_warns(coarse):
    with pytest.warns(UserWarning, match="The family's own error makes most"):
        result = coarse.calibrate(residuals(noisy(2.7, noise=1e-3)))

    assert abs(result.parameter - 2.7) < 1.96 * result.error


def test_a_family_without_terms_warns_that_its_error_is_unknown(base, family, tmp_path):
    family.save_pretrained(tmp_path)
    without = ParametricAdapter.from_pretrained(base, tmp_path)

    with pytest.warns(UserWarning, match="no residual terms"):
        without.calibrate(residuals(noisy(2.9)))


def test_the_parameter_does_not_depend_on_the_units_of_the_data(family):
    difference = residuals(noisy(2.9))

    result = family.calibrate(difference)
    scaled = family.calibrate(lambda model: 1e-6 * difference(model))

    assert scaled.parameter == pytest.approx(result.parameter, rel=1e-6)
    assert scaled.error == pytest.approx(result.error, rel=1e-3)


def test_the_result_is_the_least_sum_of_squares(family):
    data = noisy(2.9)

    result = family.calibrate(residuals(data))

    parameters = np.linspace(result.parameter - 0.05, result.parameter + 0.05, 41)
    losses = [residuals(data)(family.predict(c)).square().sum().item() for c in parameters]
    assert parameters[np.argmin(losses)] == pytest.approx(result.parameter, abs=0.003)
    curvature = np.polyfit(parameters - result.parameter, losses, 2)[0]  # Laplace's approximation
    assert result.error == pytest.approx(result.noise / curvature**0.5, rel=0.1)
    torch.testing.assert_close(result.prediction(X), family.predict(result.parameter)(X))


def test_two_parameters_are_calibrated(base):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=6)
    family.fit(itertools.product((2.8, 3.0, 3.2), (0.9, 1.1)), max_steps=6, progress=False)

    result = family.calibrate(residuals(1.07 * noisy(2.9)))

    assert result.parameter == pytest.approx((2.9, 1.07), abs=0.1)
    assert len(result.error) == 2
    assert result.covariance.shape == (2, 2)
    assert result.covariance[0, 1] == pytest.approx(result.covariance[1, 0])


def test_parameters_that_data_cannot_tell_apart(base):
    """The solution depends only on the product of two parameters."""
    family = ParametricAdapter(base, terms_of_product, ranks=6)
    # four corners do not determine how the product bends between them
    family.fit(itertools.product((0.8, 1.0, 1.2), repeat=2), max_steps=6, progress=False)

    with refused("along the direction") as error:
        family.calibrate(residuals(noisy(3.0)))

    direction = re.search(r"direction \((.*?), (.*?)\)", str(error.value))
    assert float(direction[1]) * float(direction[2]) < 0  # one rises, the other falls


def test_data_that_do_not_determine_the_parameter(family):
    with refused("do not determine the parameter"):
        family.calibrate(lambda model: 0 * model(X) - noisy(3.0))


def test_the_result_is_inside_of_the_members(family):
    assert family.calibrate(residuals(noisy(3.47))).parameter <= 3.5


@pytest.mark.parametrize(
    "function, message",
    [
        (residuals(noisy(3.0).flatten()), r"\(60, 60\): values \(n, 1\) minus data"),
        (residuals(noisy(3.0) * torch.nan), "infinite numbers for 60 of 60 values.*`ignore_missing=True`"),
    ],
    ids=["all pairs", "NaN"],
)
def test_wrong_residuals(family, function, message):
    with refused(message):
        family.calibrate(function)


@pytest.mark.parametrize("kind", ["noise", "dropout", "batch", "batch of another size"])
def test_random_residuals_are_refused(family, kind):
    """Two evaluations of the same model differ."""
    data = noisy(3.0)

    def random(model):
        values = residuals(data)(model)
        if kind == "noise":
            return values + 1e-3 * torch.randn_like(values)
        if kind == "dropout":
            return torch.nn.functional.dropout(values, 0.1)
        count = 30 if kind == "batch" else int(torch.randint(20, 40, ()))
        return values[torch.randperm(60)[:count]]

    with refused("`residuals` returns different values for the same model"):
        family.calibrate(random)


def test_missing_data_are_left_out_if_asked(family):
    data = noisy(2.9)
    missing = torch.arange(len(X)) % 4 == 0
    with_gaps = data.clone()
    with_gaps[missing] = torch.nan

    result = family.calibrate(residuals(with_gaps), ignore_missing=True)

    expected = family.calibrate(lambda model: residuals(data)(model)[~missing])
    assert result.parameter == pytest.approx(expected.parameter, rel=1e-9)
    assert result.error == pytest.approx(expected.error, rel=1e-6)


def test_too_few_data_that_are_not_missing_are_refused(family):
    data = torch.full_like(X, torch.nan)
    data[7] = 0.5

    with refused("1 values without NaN, but must have more than 1"):
        family.calibrate(residuals(data), ignore_missing=True)
    with refused("infinite"):
        family.calibrate(residuals(noisy(3.0) / 0), ignore_missing=True)


@pytest.mark.parametrize("c", [0.25, 0.8, 2.2, 4.0, 1.5, 5.25, 7.0, 10.5, 17.5, 35.0])
@pytest.mark.parametrize("noise", [0.0, NOISE, 0.1])
def test_data_outside_of_the_members_are_refused(family, c, noise):
    """The best parameter inside does not explain them."""
    with refused("outside of the fitted members"):
        family.calibrate(residuals(noisy(c, noise=noise)))


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_large_noise_is_no_misfit(family, noise):
    for seed, c in enumerate(np.linspace(2.7, 3.3, 10).tolist()):
        result = family.calibrate(residuals(noisy(c, seed, noise)))

        assert abs(result.parameter - c) < 4 * result.error
