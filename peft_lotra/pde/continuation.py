# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Continuation: from an easy problem to a hard one by steps of a parameter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..modules.checks import check_count, check_number


SHORTEST = 1e-3  # step, as a share of the path


class ContinuationStep(NamedTuple):
    """The record of one solve of `continuation`.

    Attributes:
        value: The parameter of the PDE.
        loss: What `solve` returned.
        accepted: Whether the model keeps the result.
    """

    value: float
    loss: float
    accepted: bool


def continuation(
    model: nn.Module,
    solve: Callable[[float], Any],
    start: float,
    stop: float,
    *,
    target: float = math.inf,
    steps: int = 5,
) -> list[ContinuationStep]:
    """Train a model for a PDE at `start`, and from there, step by step, at parameters up to `stop`.

    A solve whose loss is above `target` or NaN is undone and tried again at a quarter of the step; after a success the
    step doubles. An exception undoes the solve too.

    Args:
        model: The network that `solve` trains; its parameters and buffers are restored after a failure.
        solve: Trains at a parameter of the PDE. It returns the loss, or the history of `LevenbergMarquardt.fit`, whose
            lowest held loss counts, or whose last loss. It must not change the shapes of parameters.
        start, stop: The first and the last parameter.
        target: The largest loss that is accepted.
        steps: The number of steps of a path without failures, after the first solve. They have equal ratios, or equal
            lengths if zero is between `start` and `stop`.

    Returns:
        The record of each solve.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: A solve fails at `start`, or the step gets too short. The model keeps the last success.

    Source: E. L. Allgower and K. Georg, "Introduction to Numerical Continuation Methods" (1990), chapter 6.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> from peft_lotra.least_squares import LevenbergMarquardt
        >>> from peft_lotra.pde import HardConstraint, box_points, continuation
        >>> model = HardConstraint(KAN([1, 4, 1]), lambda x: 1 - x**2).double()
        >>> x = box_points([-1], [1], 40)
        >>> def solve(viscosity):  # of a boundary layer
        ...     def equation(model, x):
        ...         u, du, d2u = jet(model, x)
        ...         return viscosity * d2u[0] + du[0] + 1
        ...     optimizer = LevenbergMarquardt(model)
        ...     return optimizer.fit([(equation, x)], 10, progress=False)
        >>> path = continuation(model, solve, 1.0, 0.1, target=0.1, steps=3)
        >>> path[-1].value, path[-1].accepted
        (0.1, True)
    """
    steps = check_count(steps, "steps")
    start = check_number(start, "start", "(-inf, inf)")
    stop = check_number(stop, "stop", "(-inf, inf)")

    def value_at(share: float) -> float:
        if share == 1.0:
            return stop
        if start * stop > 0:
            return start * (stop / start) ** share
        return start + share * (stop - start)

    path: list[ContinuationStep] = []
    solved = -1.0  # the share of the path; negative before the start is solved
    length = 1 / steps
    while solved < 1.0:
        share = 0.0 if solved < 0 else solved + length
        if share > 1.0 - 1e-9 or start == stop:
            share = 1.0
        value = value_at(share)
        state = copy.deepcopy(model.state_dict())
        try:
            loss = _last_loss(solve(value))
        except BaseException:  # Ctrl-C too
            model.load_state_dict(state)
            raise

        accepted = loss <= target  # false for NaN
        path.append(ContinuationStep(value, loss, accepted))
        if accepted:
            solved = share
            length = min(1 / steps, 2 * length)
            continue
        model.load_state_dict(state)
        length /= 4
        if solved < 0 or length < SHORTEST:
            advice = "Train longer, or start elsewhere."
            if solved >= 0:
                advice = f"It is solved at {value_at(solved):g}."
            raise RuntimeError(f"At {value:g} the loss is {loss:.3g}, more than `target` ({target:g}). {advice}")
    return path


def _last_loss(result: Any) -> float:
    """Return the loss from the result of `solve`: a number, or the history of `LevenbergMarquardt.fit`."""
    if not isinstance(result, list):
        return float(result)
    held_losses = [step.held_loss for step in result]
    if math.isnan(held_losses[-1]):
        return result[-1].loss
    return min(held_losses)
