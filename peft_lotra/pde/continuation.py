# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Continuation: from an easy equation to a hard one by steps of a parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from .training import COARSE, FAILED, Training


STAGES = 6  # parameters of a continuation
CONTINUED = 0.6  # the share of the budget after which it ends
SOLVED = 1e-4  # of the first residual's square: where a stage ends; it is undone from `FAILED` on
MOST_FAILURES = 3  # stages that are undone


def train_along(training: Training, start: float, stop: float) -> None:
    """Solve the equation at parameters from `start` on, each from the solution of the one before."""
    first = training.result.first_residual**2
    before = len(training.phases)

    def stage(parameter: float) -> bool:
        training.parameter = parameter
        number = len(training.phases) - before + 1
        until = min(CONTINUED * number / STAGES, COARSE)
        training.restart_optimizer()
        least = training.fit("continuation", until, SOLVED * first, is_patient=False)
        stages = training.phases[before:]
        failures = sum(phase.held > FAILED * first for phase in stages)
        if training.is_over or len(stages) == 1 or failures > MOST_FAILURES:
            return True  # neither the first stage nor one that is out of time can be tried again
        return least / first <= FAILED

    continuation(training.trained, stage, start, stop, STAGES - 1)


def continuation(
    model: nn.Module,
    solve: Callable[[float], bool],
    start: float,
    stop: float,
    steps: int,
) -> None:
    """Train a model for an equation at `start`, and from there, step by step, at parameters up to `stop`.

    A solve that fails is undone and tried again at a quarter of the step; after a success the step doubles. An
    exception undoes the solve too.

    Args:
        model: The network that `solve` trains; its parameters and buffers are restored after a failure.
        solve: Trains at a parameter of the equation, and returns whether the model keeps the result, as at `start`.
        start, stop: The first and the last parameter.
        steps: The number of steps of a path without failures, after the first solve. They have equal ratios, or equal
            lengths if zero is between `start` and `stop`.

    Source: E. L. Allgower and K. Georg, "Introduction to Numerical Continuation Methods" (1990), chapter 6.
    """

    def value_at(share: float) -> float:
        if share == 1.0:
            return stop
        if start * stop > 0:
            return start * (stop / start) ** share
        return start + share * (stop - start)

    solved = -1.0  # the share of the path; negative before the start is solved
    length = 1 / steps
    while solved < 1.0:
        share = 0.0 if solved < 0 else solved + length
        if share > 1.0 - 1e-9 or start == stop:
            share = 1.0
        state = copy.deepcopy(model.state_dict())
        try:
            is_solved = solve(value_at(share))
        except BaseException:  # Ctrl-C too
            model.load_state_dict(state)
            raise

        if is_solved:
            solved = share
            length = min(1 / steps, 2 * length)
        else:
            model.load_state_dict(state)
            length /= 4
