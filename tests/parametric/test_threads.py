# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that several threads use at once: the answers are those of one thread."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import family_problems as problems
import pytest
import torch

from peft_lotra import ParametricAdapter
from peft_lotra.kan import jet
from peft_lotra.pde import HardConstraint


X = problems.POINTS
PARAMETERS = [2.55, 2.67, 2.79, 2.91, 3.03, 3.15, 3.27, 3.39]
USES = {
    "values": lambda family, c: family.predict(c)(X),
    "apply": lambda family, c: torch.cat(family.predict(c).apply(jet, X)[1:]),
    "residual": lambda family, c: family.predict(c).residual,
    "indicator": lambda family, c: family.predict(c).indicator,
    "refine": lambda family, c: family.refine(c)(X),
    "as_adapter": lambda family, c: family.as_adapter(c)(X),
}


def solution_of(network, c):
    return HardConstraint(network, lambda x: 1 - x**2, lift=lambda x: c * x)


def solution_terms_of(c):
    return [(lambda model, x: jet(model, x)[2][0] + c**2 * torch.sin(c * x), X)]


@pytest.fixture(scope="module")
def other(base):
    """A family of solutions, in float32: its residuals exchange parameters, too."""
    family = ParametricAdapter(copy.deepcopy(base).float(), solution_terms_of, ranks=4, solution_of=solution_of)
    family.fit([2.5, 3.0, 3.5], max_steps=5, progress=False)
    return family


def in_threads(function, arguments):
    """The results of a function by as many threads as arguments, all of which start together."""
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        return [function(argument) for _ in range(5)]

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


@pytest.mark.parametrize("name", USES)
def test_each_use_by_eight_threads(family, name):
    expected = [USES[name](family, c) for c in PARAMETERS]

    found = in_threads(lambda c: USES[name](family, c), PARAMETERS)

    for values, value in zip(found, expected, strict=True):
        torch.testing.assert_close(values, [value] * 5)


def test_all_uses_at_once_of_solutions_of_parameters(other):
    x = X.float()
    uses = [
        lambda c: other.predict(c)(x),
        lambda c: torch.cat(other.predict(c).apply(jet, x)[1:]),
        lambda c: other.predict(c).residual,
        lambda c: other.predict(c).indicator,
        lambda c: other.refine(c).residual,
        lambda c: other.as_adapter(c)(x),
    ]
    jobs = list(zip(uses, PARAMETERS, strict=False))
    expected = [use(c) for use, c in jobs]

    found = in_threads(lambda job: job[0](job[1]), jobs)

    for values, value in zip(found, expected, strict=True):
        torch.testing.assert_close(values, [value] * 5)


def test_a_prediction_inside_of_another(family):
    first, second = family.predict(2.6), family.predict(3.3)

    difference = first.apply(lambda model: model(X) - second(X))

    torch.testing.assert_close(difference, first(X) - second(X))


def test_predictions_while_the_family_is_fitted(base):
    """They are those of the members before, or of those after."""
    family = ParametricAdapter(base, problems.terms_of, ranks=4)
    family.fit([2.8, 3.0, 3.2], progress=False)
    before = family.predict(2.9)(X)

    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(family.fit, [2.7, 2.85, 2.95], max_steps=10, progress=False)
        found = [family.predict(2.9)(X)]
        while not fit.done():
            found.append(family.predict(2.9)(X))
    fit.result()

    after = family.predict(2.9)(X)
    assert not torch.equal(before, after)
    assert all(torch.equal(values, before) or torch.equal(values, after) for values in found)


def test_a_family_is_saved_while_it_predicts(base, family, tmp_path):
    expected = family.predict(2.9)(X)
    saves = [lambda place=place: family.save_pretrained(tmp_path / str(place)) for place in range(4)]
    passes = [lambda: family.predict(2.9)(X)] * 4

    found = in_threads(lambda use: use(), saves + passes)

    for values in found[len(saves) :]:
        torch.testing.assert_close(values, [expected] * 5, rtol=0, atol=0)
    for place in range(4):
        saved = ParametricAdapter.from_pretrained(base, tmp_path / str(place))
        torch.testing.assert_close(saved.predict(2.9)(X), expected)


def test_another_thread_may_draw_random_numbers(family):
    """The global generator moves on meanwhile, but the residuals are not random."""
    expected = family.refine(2.9)(X)
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(3)

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        try:
            found = [family.refine(2.9)(X) for _ in range(20)]
        finally:
            stop.set()
        drawing.result()

    torch.testing.assert_close(found, [expected] * 20)
