# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt for adapters, and for any model whose trainable parameters are few enough."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .least_squares import LeastSquares, Plans, Term, check_terms
from .linear_model import LinearModel


SMALLEST_DAMPING = 1e-16  # less is lost in the rounding of the normal equations


class LevenbergMarquardtStep(NamedTuple):
    """The record of one step.

    Attributes:
        loss: The loss of the parameters that the model now has; NaN if it is not finite.
        damping: The damping that the next step starts with.
        accepted: Whether the parameters changed.
        attempts: The number of damped systems that were solved.
        decrease: The decrease of the loss, as a share of the loss.
        reason: Why the parameters did not change; empty if they did.
    """

    loss: float
    damping: float
    accepted: bool
    attempts: int = 0
    decrease: float = 0.0
    reason: str = ""


class LevenbergMarquardt:
    r"""Trains a model on a sum of squares, sum_t weight_t mean_n |r_t(row_n)|^2, by damped Gauss-Newton steps.

    With all residuals in a vector r, each multiplied by sqrt(weight_t / n_t), and their Jacobian J, a step solves

        (J^T J + damping S) step = -J^T r,

    or the same in the space of the residuals if residuals are fewer than parameters. S is the diagonal of J^T J,
    bounded from below. Everything is computed in float64. KANs are differentiated layer by layer, other models row by
    row (docs/notes/optim.md says how, and how to choose).

    Args:
        model: Any model; the parameters that require a gradient are trained.
        damping: The damping that the first step tries.
        geodesic: Whether steps get a second-order correction (arXiv 1201.5885).
        floor: The lower bound of S, as a share of its largest entry.
        memory: Bytes that matrices and chunks of rows may take.
        max_damping: The damping at which a step gives up.

    Attributes:
        damping: The damping that the next step tries.
        model, geodesic, floor, memory, max_damping: The arguments.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: No parameter requires a gradient, or an argument is out of range.

    Source: J. J. More, "The Levenberg-Marquardt algorithm" (1978).
    """

    def __init__(
        self,
        model: nn.Module,
        damping: float = 1e-2,
        *,
        geodesic: bool = False,
        floor: float = 1e-3,
        memory: int = 2**30,
        max_damping: float = 1e12,
    ) -> None:
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise TypeError(f"`model` is {kind}, but must be an nn.Module: give the model, not `model.parameters()`.")
        for name, value, low in (("damping", damping, 0), ("floor", floor, 0), ("max_damping", max_damping, damping)):
            if not (math.isfinite(value) and value > low):
                raise ValueError(f"`{name}` is {value!r}, but must be a finite number above {low}.")
        if floor > 1:
            raise ValueError(f"`floor` is {floor!r}, but must be at most 1.")
        if memory < 2**20:
            raise ValueError(f"`memory` is {memory!r} bytes, but must be at least {2**20} (1 MiB).")
        self.model = model
        self.damping = damping
        self.geodesic = geodesic
        self.floor = floor
        self.memory = memory
        self.max_damping = max_damping
        self._plans: Plans = {}  # of the last step's terms
        self._trainable()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}  # keyed by the `id` of functions

    def step(self, terms: Iterable[Term]) -> LevenbergMarquardtStep:
        """Takes one step. If it is not accepted, the parameters are unchanged bit for bit.

        Args:
            terms: Residual terms (function, rows, weight). `function(model, *rows)` is called with any number n of
                rows and returns n residuals, or (n, m) for m in each row, which do not depend on the other rows.
                `rows` are tensors of equal length; `weight` is a positive number, 1 if left out.

        Returns:
            The record of the step. It is not accepted if the residuals are not finite (a warning names the term, the
            damping stays), or if no damping up to `max_damping` makes the loss fall.

        Raises:
            ValueError: A term is malformed, random (dropout in training mode), or depends on other rows (batch
                normalization in training mode), or the matrices do not fit into `memory`.

        Example:
            >>> from peft_lotra.kan import KAN, jet
            >>> def equation(model, x):  # -u'' = 1
            ...     return jet(model, x)[2][0] + 1
            >>> def boundary(model, x):  # u(-1) = u(1) = 0
            ...     return model(x)
            >>> points, ends = torch.linspace(-1, 1, 20).unsqueeze(1), torch.tensor([[-1.0], [1.0]])
            >>> LevenbergMarquardt(KAN([1, 1])).step([(equation, points), (boundary, ends, 10.0)]).accepted
            True
        """
        problem = LeastSquares(self.model, self._trainable(), check_terms(terms), self.memory, self._plans)
        self._plans = problem.plans
        residuals = problem.residuals(problem.start)
        if error := problem.find_not_finite(residuals):
            warnings.warn(f"Step refused: {error}", RuntimeWarning, stacklevel=2)
            return LevenbergMarquardtStep(math.nan, self.damping, False, reason=error)
        loss = residuals.square().sum().item()
        linear = LinearModel(problem, residuals, self.floor)
        if error := linear.error:
            warnings.warn(f"Step refused: {error}", RuntimeWarning, stacklevel=2)
            return LevenbergMarquardtStep(loss, self.damping, False, reason=error)

        damping, factor, attempts = self.damping, 2.0, 0
        while damping <= self.max_damping:
            attempts += 1
            step = linear.solve(damping, residuals)
            predicted_decrease = math.nan if step is None else linear.predicted_decrease(damping, step)
            if step is not None and self.geodesic:
                step = self._accelerate(linear, damping, step)
            if step is not None:
                candidate = problem.round(problem.start + step)
                new_loss = problem.residuals(candidate).square().sum().item()
                if new_loss < loss:  # not if it is NaN
                    agreement = (loss - new_loss) / predicted_decrease
                    damping *= _damping_factor(agreement, raised=attempts > 1)
                    self.damping = max(damping, SMALLEST_DAMPING)
                    problem.write(candidate)
                    return LevenbergMarquardtStep(new_loss, self.damping, True, attempts, 1 - new_loss / loss)
            damping *= factor
            factor *= 2
        reason = (
            f"No damping up to {self.max_damping:g} makes the loss fall below {loss:.6g}: the parameters are at a "
            "minimum to rounding, or the normal equations are singular."
        )
        return LevenbergMarquardtStep(loss, self.damping, False, attempts, reason=reason)

    def fit(
        self,
        terms: Iterable[Term] | Callable[[int], Iterable[Term]],
        steps: int = 100,
        *,
        target_loss: float = 0.0,
        tolerance: float = 0.0,
        patience: int = 5,
        max_seconds: float = math.inf,
        callback: Callable[[int, LevenbergMarquardtStep], Any] | None = None,
        progress: bool = True,
    ) -> list[LevenbergMarquardtStep]:
        """Takes steps until a step is not accepted, or an argument stops it.

        Args:
            terms: As for `step`, or a function of the step's number that returns terms (new points for each step).
            steps: The most steps.
            target_loss: The loss at which to stop.
            tolerance, patience: Stops when `decrease` was below `tolerance` in `patience` steps in a row.
            max_seconds: The time after which to stop.
            callback: Called with the step's number and its record; stops if it returns True.
            progress: Whether to show a bar.

        Returns:
            One record for each step.
        """
        from tqdm import tqdm

        history: list[LevenbergMarquardtStep] = []
        slow, end = 0, time.monotonic() + max_seconds
        terms = terms if callable(terms) else list(terms)
        with tqdm(total=steps, unit="step", desc="Levenberg-Marquardt", disable=not progress) as bar:
            for number in range(steps):
                record = self.step(terms(number) if callable(terms) else terms)
                history.append(record)
                bar.update()
                bar.set_postfix(loss=f"{record.loss:.3e}", damping=f"{record.damping:.0e}")
                slow = slow + 1 if record.decrease < tolerance else 0
                stop = callback is not None and callback(number, record) is True
                stop = stop or not record.accepted or record.loss <= target_loss or slow >= patience
                if stop or time.monotonic() > end:
                    break
        return history

    def _trainable(self) -> dict[str, nn.Parameter]:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "No parameter of the model requires a gradient. Load the adapter with `is_trainable=True`, or "
                "activate it with `model.set_adapter(name)`."
            )
        return trainable

    def _accelerate(self, linear: LinearModel, damping: float, step: Tensor) -> Tensor | None:
        """The step with half of the second-order correction; None if that is large, since the series may diverge."""
        second = linear.second_derivative(step)
        correction = linear.solve(damping, second) if second.isfinite().all() else None
        if correction is None or linear.norm(correction) > 0.75 * linear.norm(step):
            return None
        return step + correction / 2


def _damping_factor(agreement: float, raised: bool) -> float:
    """The factor of the damping after a step whose decrease is `agreement` times the predicted one; if the damping was
    just `raised`, less damping has just failed. docs/notes/optim.md says why the factors are these."""
    if agreement > 0.75:
        return 0.5 if raised else 0.1
    return 0.5 if agreement > 0.25 else 2.0
