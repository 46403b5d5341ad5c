# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import gc

import pytest
import torch
from helpers import adapt, refused
from residuals import equation, fit, problem, terms
from residuals import network as deep_network
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


def points(rows=70):
    return torch.rand(rows, 2, dtype=torch.float64) * 2.4 - 1.2  # some outside of the grids


def network():
    return KAN([2, 5, 4, 2], dtype=torch.float64)


def laplacian_and_value(model, x):
    u, du, second = jet(model, x, collapse=True)
    return torch.cat([second - u**3, du[0] * model(x)], dim=-1)


# Terms


X = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "terms, message",
    [
        ([], "no residual terms"),
        ((fit, X), r"`terms\[0\]` is <function fit .* must be .function, rows. or .function, rows, weight."),
        ([(X, fit)], "residual term 0 .Tensor. has rows of lengths .None."),
        ([(fit, [])], r"residual term 0 \(fit\) has rows of lengths \[\]"),
        ([(fit, (X, torch.zeros(3, 1)))], r"has rows of lengths \[2, 3\]"),
        ([(fit, X[:0])], "residual term 0 .fit. has no rows"),
        ([(fit, X, -1.0)], "and the weight -1.0"),
        ([(fit, X, torch.zeros(2, 1))], "and the weight tensor"),
        ([(fit, X, 1.0, 2.0)], "must be .function, rows. or .function, rows, weight."),
    ],
)
def test_malformed_terms_are_refused(terms, message):
    with refused(message):
        LevenbergMarquardt(deep_network()).step(terms)


@pytest.mark.parametrize("residual", [equation, fit])
def test_no_dense_gradient_for_an_adapter(residual):
    width = 120
    model = adapt(deep_network(width), r=(3, 3, 3))
    residual_terms = [term for term in terms(points=40) if term[0] is residual]

    (term,) = problem(model, residual_terms).terms

    assert term.trial.by_layers
    assert term.trial.row_bytes < 8 * 9 * width**2 / 4


class Equation:
    """A function, and a bound method, which is a new object at each access."""

    def __init__(self):
        self.calls = []

    def residual(self, model, x):
        self.calls.append(len(x))
        return model(x)

    def __call__(self, model, x):
        return self.residual(model, x)


@pytest.mark.parametrize("method", [False, True])
def test_a_term_is_tried_once(method):
    equation_of_x = Equation()
    optimizer = LevenbergMarquardt(network())
    counts = []

    for _ in range(3):
        equation_of_x.calls.clear()
        function = equation_of_x.residual if method else equation_of_x
        record = optimizer.step([(function, points()), (laplacian_and_value, points())])
        assert record.accepted
        counts.append(len(equation_of_x.calls))

    assert max(counts[1:]) < counts[0]
    assert set(equation_of_x.calls) == {70}


def test_a_term_that_is_held_out_is_tried_once():
    held = Equation()

    LevenbergMarquardt(network()).fit([(laplacian_and_value, points())], 3, held=[(held, points())], progress=False)

    assert held.calls[-4:] == [70] * 4  # before the first step, and after each


@pytest.fixture
def frozen_heap():
    """Hide older objects from the garbage collector, which makes it fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind", ["adapter", "other network"])
@pytest.mark.usefixtures("frozen_heap")
def test_no_tensor_of_a_term_that_is_gone_stays(kind):
    if kind == "adapter":
        model = adapt(network(), r=2)
        residual = laplacian_and_value
    else:
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh()).double()
        residual = nn.Module.__call__
    optimizer = LevenbergMarquardt(model)

    def count_tensors_after_steps():
        for _ in range(3):
            optimizer.step([(lambda model, x: residual(model, x), points(20))])
        gc.collect()
        return sum(type(instance) in (Tensor, nn.Parameter) for instance in gc.get_objects())

    count = count_tensors_after_steps()

    assert count_tensors_after_steps() < count + 5
