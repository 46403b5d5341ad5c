# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Continuation: a hard problem reached by steps of a parameter from an easy one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules.calls import check_module
from ..modules.checks import as_number, check_count, check_function


class ContinuationStep(NamedTuple):
    """One solve of a continuation.

    Attributes:
        value: The parameter of the PDE.
        loss: What `solve` returned.
        accepted: Whether the model keeps what was solved.
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
    prepare: Callable[[float], Any] | None = None,
    steps: int = 5,
    shrinkage: float = 2.0,
    smallest: float = 1e-3,
    scale: str = "log",
) -> list[ContinuationStep]:
    """Trains a model for a PDE at `start`, and from there, step by step, at parameters up to `stop`.

    A solve whose loss is above `target`, or not finite, is taken back, and tried again at a shorter step; after a
    success the step grows again. One that raises is taken back too.

    Args:
        model: What `solve` trains; its parameters and buffers are taken back after a failure.
        solve: Trains at a parameter and returns the loss, or the history of `LevenbergMarquardt.fit`, whose last loss
            (the held one, if there is one) counts. It must not change the shapes of the parameters.
        start, stop: The first and the last parameter.
        target: The largest loss that is accepted.
        prepare: Called before each solve, and not taken back: the place to call `refine_grid`.
        steps: The number of equal steps of a path without failures, after the first solve.
        shrinkage: By which a step is divided after a failure.
        smallest: The shortest step, as a share of the path.
        scale: "log" for steps of equal ratio, "linear" for steps of equal length.

    Returns:
        The record of each solve.

    Raises:
        ValueError: An argument is out of range.
        TypeError: `model` is no module.
        RuntimeError: A solve fails at `start`, or the step gets too short. The model is that of the last success.

    Source: E. L. Allgower and K. Georg, "Introduction to Numerical Continuation Methods" (1990), chapter 6.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> from peft_lotra.optim import LevenbergMarquardt
        >>> from peft_lotra.pde import HardConstraint, box_points, continuation
        >>> model, x = HardConstraint(KAN([1, 4, 1]), lambda x: 1 - x**2).double(), box_points([-1], [1], 40)
        >>> def solve(viscosity):  # of a boundary layer
        ...     def equation(model, x):
        ...         u, du, d2u = jet(model, x)
        ...         return viscosity * d2u[0] + du[0] + 1
        ...     return LevenbergMarquardt(model).fit([(equation, x)], 10, progress=False)
        >>> path = continuation(model, solve, 1.0, 0.1, target=0.1, steps=3)
        >>> path[-1].value, path[-1].accepted
        (0.1, True)
    """
    check_module(model)
    if scale not in ("log", "linear"):
        raise ValueError(f"`scale` is {scale!r}, but must be 'log' or 'linear'.")
    for name, function in (("solve", solve), ("prepare", prepare)):
        if function is not None or name == "solve":
            check_function(function, name)
    ends = as_number(start), as_number(stop)
    if any(map(math.isnan, ends)) or (scale == "log" and not ends[0] * ends[1] > 0):
        raise ValueError(
            f"`start` is {start!r:.100} and `stop` {stop!r:.100}, but must be finite, and of the same sign for "
            "equal ratios: take scale='linear' otherwise."
        )
    start, stop = ends
    steps = check_count(steps, "steps")
    if not (as_number(shrinkage) > 1 and 0 < as_number(smallest) <= 1):
        raise ValueError(
            f"`steps` is {steps}, `shrinkage` {shrinkage!r:.100} and `smallest` {smallest!r:.100}, but must be an "
            "integer of at least 1, above 1, and in (0, 1]."
        )
    if target != math.inf and math.isnan(as_number(target)):
        raise ValueError(f"`target` is {target!r:.100}, but must be a number, the largest loss that is accepted.")

    def value_at(share: float) -> float:
        if share in (0.0, 1.0):
            return stop if share else start
        return start * (stop / start) ** share if scale == "log" else start + share * (stop - start)

    path: list[ContinuationStep] = []
    reached, length = -1.0, 1 / steps  # -1: not even the start
    while reached < 1.0:
        share = 0.0 if reached < 0 else min(1.0, reached + length)
        share = 1.0 if 1.0 - share < 1e-9 or start == stop else share
        value = value_at(share)
        if prepare is not None:
            prepare(value)
        before = copy.deepcopy(model.state_dict())
        try:
            loss = _last_loss(solve(value))
        except BaseException:  # Ctrl-C too
            model.load_state_dict(before)
            raise
        accepted = loss <= target  # not if it is NaN
        path.append(ContinuationStep(value, loss, accepted))
        if accepted:
            reached, length = share, min(1 / steps, length * math.sqrt(shrinkage))
            continue
        model.load_state_dict(before)
        length /= shrinkage
        if reached < 0 or length < smallest:
            raise RuntimeError(
                f"At {value:g} the loss is {loss:.3g}, more than `target` ({target:g}), "
                + (
                    "and there is no easier problem: take another `start`, more training, or a larger network."
                    if reached < 0
                    else f"after steps down to {length:.1e} of the path. The model is solved at {value_at(reached):g}."
                )
            )
    return path


def _last_loss(result: Any) -> float:
    if isinstance(result, Tensor) and result.numel() == 1:
        result = result.item()
    if isinstance(result, Real):
        return float(result)
    if not isinstance(result, list) or not all(hasattr(entry, "held_loss") for entry in result):
        raise TypeError(
            f"`solve` returned {result!r:.100}, but must return the loss, a number, or the history of "
            "`LevenbergMarquardt.fit`."
        )
    if not result:
        raise ValueError("`solve` returned an empty history, but must return a loss, or a history with a step.")
    held = [entry.held_loss for entry in result]  # of `LevenbergMarquardt.fit`
    return result[-1].loss if math.isnan(held[-1]) else min(held)
