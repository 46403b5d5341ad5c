# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import continuation


class Tracker(nn.Module):
    """A root that Newton's method finds from a near start only: x^3 = value, with steps that may not be long."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones((), dtype=torch.float64))

    def solve(self, value: float, reach: float = 2.1) -> float:
        with torch.no_grad():
            if value / self.x.item() ** 3 > reach:
                self.x.fill_(-7.0)  # lost
                return math.inf
            self.x.fill_(value ** (1 / 3))
        return abs(self.x.item() ** 3 - value)


def test_a_path_without_failures_has_equal_ratios():
    model = Tracker()

    path = continuation(model, model.solve, 1.0, 16.0, target=1e-9, steps=4)

    values = [entry.value for entry in path]
    assert values == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0])
    assert values[-1] == 16.0
    assert all(entry.accepted for entry in path)


def test_a_failure_is_taken_back_and_tried_at_a_shorter_step():
    model = Tracker()

    path = continuation(model, model.solve, 1.0, 1000.0, target=1e-9, steps=3)

    assert not path[1].accepted
    assert path[1].value == pytest.approx(10.0)
    assert path[2].value < path[1].value
    accepted = [entry.value for entry in path if entry.accepted]
    assert accepted == sorted(accepted)
    assert accepted[-1] == 1000.0
    assert model.x.item() == pytest.approx(10.0)


def test_steps_grow_again_after_a_failure():
    losses = iter([0.0, math.inf, *[0.0] * 20])

    path = continuation(Tracker(), lambda _: next(losses), 0.0, 1.0, steps=2, target=1)

    first, second, third, *_ = [entry.value for entry in path if entry.accepted]
    assert second - first == 0.125
    assert third - second > 0.125


FAILURES = {
    "Train longer, or start elsewhere": lambda model, value: math.nan,
    "It is solved at 1": lambda model, value: model.solve(value, 1.0),
    "not 'NoneType'": lambda model, value: model.x.data.fill_(9.0) and None,
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_path_that_ends_early_restores_the_model(message):
    model = Tracker()

    with pytest.raises((RuntimeError, TypeError), match=message):
        continuation(model, lambda value: FAILURES[message](model, value), 1.0, 2.0, target=1e-9)

    assert model.x.item() == 1.0


def test_the_history_of_levenberg_marquardt_counts():
    model = nn.Linear(1, 1, dtype=torch.float64)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]

    def solve(value: float):
        term = (lambda model, x: model(x) - value * x, x)
        return LevenbergMarquardt(model).fit([term], 8, held=[term], progress=False)

    path = continuation(model, solve, 1.0, 3.0, target=1e-6, steps=1)

    assert [entry.value for entry in path] == [1.0, 3.0]
    assert path[-1].loss < 1e-6
    assert model.weight.item() == pytest.approx(3.0, abs=1e-2)


WRONG = [("start", math.inf), ("steps", 0)]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_arguments_are_refused(name, value):
    model = Tracker()

    with pytest.raises((TypeError, ValueError), match=f"`{name}` "):
        continuation(model, **{"solve": model.solve, "start": 1.0, "stop": 2.0, name: value})

    assert model.x.item() == 1.0
