# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The time or the steps that a training may take."""

from __future__ import annotations

import math
import time

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep


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
        before = self._spent
        self._spent = self.spent()
        self.last_step = self._spent - before
        self._bar.n = min(self._bar.total, round(self._spent * self._bar.total))
        self._bar.set_postfix(phase=phase, loss=record.loss, held=record.held_loss)

    def allows_step(self, until: float) -> bool:
        """Return whether one more step, as long as the last one, ends before a share of the budget is used up."""
        return not self.is_stopped and self._spent + self.last_step <= until + 1e-9
