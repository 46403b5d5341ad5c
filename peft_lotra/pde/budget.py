# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The time or the steps that a training may take, and when one of its phases ends."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep


PATIENCE = 15  # steps without a new minimum of the held-out loss, at least
UNSOLVED_PATIENCE = 50  # the same while that loss is large, where it often rises before it falls
STALLED = 0.1  # of the budget of a training, without a new minimum, at least


class Budget:
    """Seconds from now on, or a number of steps, with a progress bar.

    Attributes:
        steps_taken: The number of steps that were counted.
        is_stopped: Whether the caller has ended the training.
    """

    def __init__(self, seconds: float, steps: int | None, progress: bool) -> None:
        from tqdm.auto import tqdm

        self.is_timed = steps is None
        self.size = seconds if steps is None else steps
        self.steps_taken = 0
        self.is_stopped = False
        self.last_step = 0.0  # the share that the last step took
        self._start = time.monotonic()
        self._spent = 0.0  # after the last step
        unit = "s" if self.is_timed else "step"
        self._bar = tqdm(total=math.ceil(self.size), unit=unit, disable=not progress)

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def spent(self) -> float:
        """Return the share of the budget that is used up."""
        used = time.monotonic() - self._start if self.is_timed else self.steps_taken
        return used / self.size

    def count_step(self, phase: str, record: LevenbergMarquardtStep) -> None:
        """Count a step, and show its losses."""
        self.steps_taken += 1
        spent = self.spent()
        self.last_step = spent - self._spent
        self._spent = spent
        total = self._bar.total
        self._bar.n = min(total, round(spent * total))
        self._bar.set_postfix(phase=phase, loss=record.loss, held=record.held_loss)

    def allows_step(self, until: float) -> bool:
        """Return whether one more step, as long as the last one, ends before a share of the budget is used up."""
        return not self.is_stopped and self._spent + self.last_step <= until + 1e-9


@dataclass
class PhaseEnd:
    """Decides after each step whether a phase ends: out of budget, at its target, or when it stalls.

    A phase stalls when the held-out loss has no new minimum for `PATIENCE` steps and a share of the budget.

    Attributes:
        budget: The budget of all phases.
        until: The share of the budget at which the phase ends.
        target: The held-out loss at which it ends.
        solved: The held-out loss above which it has `UNSOLVED_PATIENCE`.
        width: The share of the budget for this training; it stalls after `STALLED` of it without a new minimum.
        least: The least held-out loss.
        is_over: Whether the budget allows no more steps.
    """

    budget: Budget
    until: float
    target: float
    solved: float
    width: float
    least: float = math.inf
    is_over: bool = False

    def __post_init__(self) -> None:
        self._steps_since = 0
        self._spent_at_least = self.budget.spent()

    def is_reached(self, loss: float) -> bool:
        """Count a step with this held-out loss, and return whether it was the last one."""
        spent = self.budget.spent()
        self._steps_since += 1
        if loss < self.least:
            self.least = loss
            self._steps_since = 0
            self._spent_at_least = spent
        self.is_over = not self.budget.allows_step(self.until)

        patience = PATIENCE if self.least <= self.solved else UNSOLVED_PATIENCE
        is_late = spent - self._spent_at_least >= STALLED * self.width
        is_stalled = is_late and self._steps_since >= patience
        return self.is_over or is_stalled or loss <= self.target

    def reason(self, accepted: bool) -> str:
        """Return why the phase ended, given whether the last step was accepted."""
        if self.budget.is_stopped:
            return "callback"
        if self.least <= self.target:
            return "solved"
        if self.is_over:
            return "budget"
        return "stalled" if accepted else "refused"
