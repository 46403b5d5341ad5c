# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Several threads use a family at once, with the results of one thread."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import family_problems as problems
import pytest
import torch
from torch.testing import assert_close

from peft_lotra import ParametricAdapter
from peft_lotra.kan import jet
from peft_lotra.pde import HardConstraint


X = problems.POINTS
PARAMETERS = [2.55, 3.03, 3.39]
USES = {
    "values": lambda family, c, x: family.predict(c)(x),
    "apply": lambda family, c, x: torch.cat(family.predict(c).apply(jet, x)[1:]),
    "residual": lambda family, c, x: family.predict(c).residual,
    "indicator": lambda family, c, x: family.predict(c).indicator,
    "refine": lambda family, c, x: family.refine(c)(x),
    "as_adapter": lambda family, c, x: family.as_adapter(c)(x),
}


def solution_of(network, c):
    return HardConstraint(network, lambda x: 1 - x**2, lift=lambda x: c * x)


def solution_terms_of(c):
    return [(lambda model, x: jet(model, x)[2][0] + c**2 * torch.sin(c * x), X)]


@pytest.fixture(scope="module")
def solutions(base):
    """A family of solutions, in float32: its residuals exchange parameters, too."""
    family = ParametricAdapter(copy.deepcopy(base).float(), solution_terms_of, ranks=4, solution_of=solution_of)
    family.fit([2.5, 3.0, 3.5], max_steps=5, progress=False)
    return family


def in_threads(functions):
    """Call each function three times in a thread of its own; all threads start together."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return [function() for _ in range(3)]

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def assert_as_in_one_thread(functions):
    expected = [[function()] * 3 for function in functions]

    assert_close(in_threads(functions), expected)


@pytest.mark.parametrize("name", ["family", "solutions"])
def test_all_uses_at_once_have_the_results_of_one_thread(name, request):
    family = request.getfixturevalue(name)
    x = X.to(next(family.model.parameters()).dtype)

    assert_as_in_one_thread([partial(use, family, c, x) for use in USES.values() for c in PARAMETERS])


def test_a_prediction_inside_of_another(family):
    first, second = family.predict(2.6), family.predict(3.3)

    difference = first.apply(lambda model: model(X) - second(X))

    assert_close(difference, first(X) - second(X))


def test_predictions_while_the_family_is_fitted_are_from_the_old_or_the_new_members(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=4)
    family.fit([2.8, 3.0, 3.2], progress=False)
    old = family.predict(2.9)(X)
    predictions = []

    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(family.fit, [2.7, 2.85, 2.95], max_steps=5, progress=False)
        while not fit.done():
            predictions.append(family.predict(2.9)(X))
    fit.result()

    new = family.predict(2.9)(X)
    assert not torch.equal(old, new)
    assert all(torch.equal(values, old) or torch.equal(values, new) for values in predictions)


def test_a_family_is_saved_while_it_predicts(base, family, tmp_path):
    expected = family.predict(2.9)(X)
    folders = [tmp_path / str(number) for number in range(4)]
    saves = [partial(family.save_pretrained, folder) for folder in folders]
    predictions = [lambda: family.predict(2.9)(X)] * 4

    results = in_threads(saves + predictions)

    assert_close(results[4:], [[expected] * 3] * 4, rtol=0, atol=0)
    for folder in folders:
        saved = ParametricAdapter.from_pretrained(base, folder)
        assert_close(saved.predict(2.9)(X), expected)


def test_another_thread_may_draw_random_numbers(family):
    """The global generator advances meanwhile, but the residuals are not random."""
    expected = family.refine(2.9)(X)
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(3)

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        try:
            results = [family.refine(2.9)(X) for _ in range(8)]
        finally:
            stop.set()
        drawing.result()

    assert_close(results, [expected] * 8)
