# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A path of parameters, whose steps adapt to failures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_lotra.pde.continuation import continuation


class Tracker(nn.Module):
    """Follows x^3 = value, from a value that is at most 2.1 times smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.values: list[float] = []
        self.solved: list[float] = []

    def solve(self, value: float) -> bool:
        self.values.append(value)
        with torch.no_grad():
            if value / self.x.item() ** 3 > 2.1:
                self.x.fill_(-7.0)  # lost
                return False
            self.x.fill_(value ** (1 / 3))
        self.solved.append(value)
        return True


def test_a_failure_is_taken_back_and_tried_at_a_shorter_step():
    model = Tracker()

    continuation(model, model.solve, 1.0, 1000.0, 3)

    assert model.values[1] == pytest.approx(10.0)
    assert model.values[2] < model.values[1]
    assert model.solved == sorted(model.solved)
    assert model.solved[-1] == 1000.0
    assert model.x.item() == pytest.approx(10.0)


def test_steps_grow_again_after_a_failure():
    answers = iter([True, False, *[True] * 20])
    solved = []

    def solve(value: float) -> bool:
        is_solved = next(answers)
        if is_solved:
            solved.append(value)
        return is_solved

    continuation(Tracker(), solve, 0.0, 1.0, 2)

    first, second, third, *_ = solved
    assert second - first == 0.125
    assert third - second > 0.125


def test_an_exception_restores_the_model():
    model = Tracker()

    def solve(value: float) -> bool:
        model.x.data.fill_(9.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continuation(model, solve, 1.0, 2.0, 5)

    assert model.x.item() == 1.0
