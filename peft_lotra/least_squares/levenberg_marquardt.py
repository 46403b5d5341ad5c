# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt for adapters, and for any model with few trainable parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.calls import check_module
from ..modules.checks import check_number
from .forgetting import Forgetting, Past
from .normal_equations import LinearModel
from .problem import LeastSquares, Term, Trials, check_terms, check_trainable, trainable_parameters, write_vector
from .shards import Shards


LARGEST_DAMPING = 1e12  # a step gives up above it
SMALLEST_DAMPING = 1e-16  # less is lost in the rounding of the normal equations
# The lower bound in steps that also count former residuals, see `forgetting`: with less damping, such a step fits only
# its own rows.
SMALLEST_WITH_PAST = 1e-7


class LevenbergMarquardtStep(NamedTuple):
    """The losses and the damping of one step of `LevenbergMarquardt`.

    Attributes:
        loss: The loss at the parameters after the step. NaN or infinite if a residual is.
        damping: The damping that the next step tries first.
        accepted: Whether the parameters changed.
        attempts: The number of damped systems that were solved.
        decrease: The decrease of the loss, as a share of the loss.
        reason: Why the parameters did not change. Empty if they did.
        losses: The loss of each term, weight included, in the order of the terms.
        held_losses: The loss of each held-out term, see `LevenbergMarquardt.fit`.
    """

    loss: float
    damping: float
    accepted: bool
    attempts: int = 0
    decrease: float = 0.0
    reason: str = ""
    losses: tuple[float, ...] = ()
    held_losses: tuple[float, ...] = ()

    @property
    def held_loss(self) -> float:
        """The loss of all held-out terms. NaN without any."""
        return sum(self.held_losses) if self.held_losses else math.nan


class LevenbergMarquardt:
    r"""Minimize a sum of squares, sum_t weight_t mean_n |r_t(row_n)|^2, by damped Gauss-Newton steps.

    All residuals, each multiplied by sqrt(weight_t / n_t), form a vector r with the Jacobian J. A step solves

        (J^T J + damping S) step = -J^T r,

    or an equivalent system of the size of r if there are fewer residuals than parameters. S is the diagonal of J^T J,
    bounded from below. A step that does not decrease the loss is repeated with more damping. Everything is computed in
    float64.

    Args:
        model: Any model. The parameters that require a gradient are trained.
        damping: The damping that the first step tries.
        floor: The lower bound of S, as a share of its largest entry.
        forgetting: The factor, from 0 to below 1, that reduces the weight of former residuals after each step
            (recursive least squares). It is for rows that are drawn again before each step. The former residuals need
            a matrix of the size of J^T J. "auto" raises the factor when a step fits its own rows and no others, and
            lowers it when the loss falls fast. "auto" is 0 if the rows stay the same, if they are less than half as
            many as the parameters, or after a change of a function or a weight. A number always counts: call `forget`
            after a change of the terms.
        memory: Bytes for matrices and chunks of rows.
        group: A process group of `torch.distributed`, e.g. `torch.distributed.group.WORLD`. Each process has its own
            rows of the same terms. J^T J, J^T r and losses are summed over the processes. All start from the
            parameters of the first process.

    Attributes:
        damping: The damping that the next step tries. The other arguments are attributes too.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: No parameter requires a gradient, or an argument is out of range.

    Source: J. J. More, "The Levenberg-Marquardt algorithm" (1978). For the forgetting factor, L. Ljung and T.
    Soderstrom, "Theory and Practice of Recursive Identification" (1983).

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> from peft_lotra.least_squares import LevenbergMarquardt
        >>> def equation(model, x):  # -u'' = 1
        ...     return jet(model, x)[2][0] + 1
        >>> def boundary(model, x):  # u(-1) = u(1) = 0
        ...     return model(x)
        >>> points = torch.linspace(-1, 1, 20).unsqueeze(1)
        >>> ends = torch.tensor([[-1.0], [1.0]])
        >>> terms = [(equation, points), (boundary, ends, 10.0)]
        >>> LevenbergMarquardt(KAN([1, 1])).step(terms).accepted
        True
    """

    def __init__(
        self,
        model: nn.Module,
        damping: float = 1e-2,
        *,
        floor: float = 1e-3,
        forgetting: float | str = "auto",
        memory: int = 2**30,
        group: Any = None,
    ) -> None:
        check_module(model)
        check_trainable(model)
        self.model = model
        self.damping = check_number(damping, "damping", f"(0, {LARGEST_DAMPING:g}]")
        self.floor = check_number(floor, "floor", "(0, 1]")
        if forgetting != "auto":
            forgetting = check_number(forgetting, "forgetting", "[0, 1)")
        self.forgetting = forgetting
        self.memory = int(memory)
        self._former = Forgetting()
        # how to evaluate the functions of the last step's terms, and of the held-out ones: tried once
        self._trials: Trials = {}
        self._held_trials: Trials = {}
        self._shards = Shards(group)
        for parameter in trainable_parameters(model).values():
            self._shards.broadcast(parameter.detach())

    def forget(self) -> None:
        """Drop the residuals of former steps, after a change of the terms or of the parameters. See `forgetting`."""
        self._former.past = None

    @torch.inference_mode(False)
    def step(self, terms: Iterable[Term]) -> LevenbergMarquardtStep:
        """Take one step.

        The damping of the last step is tried first. While the system is singular or the loss does not decrease, the
        damping is multiplied by 2, then by 4, then by 8, and the system is solved again. The first decrease is
        accepted, and `damping_factor` sets the damping of the next step. A step that is not accepted leaves the
        parameters unchanged bit for bit.

        Args:
            terms: Residual terms (function, rows, weight). `function(model, *rows)` is called with any number n of
                rows and returns n residuals, or (n, m) for m in each row, which do not depend on the other rows.
                `rows` are tensors of equal length. `weight` is a positive number, by default 1.

        Returns:
            The record of the step. It is not accepted if a residual or derivative at the present parameters is NaN or
            infinite (a warning names the term, and the damping stays), or if no damping decreases the loss.

        Raises:
            ValueError: A term is malformed, random (dropout in training mode), or depends on other rows (batch
                normalization in training mode), or the matrices do not fit into `memory`.
        """
        terms = check_terms(terms)
        problem = self._make_problem(terms)
        self._trials = problem.trials
        residuals = problem.residuals(problem.start)
        losses = problem.losses(residuals)
        loss = sum(losses)

        former = self._former
        former.start_step(self.forgetting, problem, terms, len(residuals))
        if not math.isfinite(loss):
            error = (
                problem.find_not_finite(residuals)
                or "the loss is infinite, or residuals of another process are NaN or infinite."
            )
            return self._refuse(error, losses)

        past = former.discounted(self.forgetting, loss)
        linear = LinearModel(problem, residuals, self.floor, past, in_parameter_space=former.uses_past)
        if linear.error:
            return self._refuse(linear.error, losses)

        # raise the damping until a step decreases the loss
        damping = self.damping
        growth = 2.0
        attempts = 0
        while damping <= LARGEST_DAMPING:
            attempts += 1
            step = linear.solve(damping)
            if step is not None:
                parameters = problem.round(problem.start + step)
                change = parameters - problem.start  # after rounding to the dtype of the model
                new_residuals = problem.residuals(parameters)
                new_losses = problem.losses(new_residuals)
                new_loss = sum(new_losses)
                # the loss falls on the rows of this step, and also together with the former residuals
                decrease = loss - new_loss - linear.rise_of_past(change)
                if new_loss < loss and decrease > 0:  # not if one is NaN
                    break
            damping *= growth
            growth *= 2
        else:
            reason = (
                f"No damping up to {LARGEST_DAMPING:g} makes the loss fall below {loss:.6g}: the parameters are "
                "at a minimum to rounding, or the normal equations are singular."
            )
            return LevenbergMarquardtStep(loss, self.damping, False, attempts, reason=reason, losses=losses)

        # the damping that the next step tries
        agreement = decrease / linear.predicted_decrease(damping, step)
        damping *= damping_factor(agreement, raised=attempts > 1)
        smallest = SMALLEST_WITH_PAST if former.uses_past else SMALLEST_DAMPING
        self.damping = min(max(damping, smallest), LARGEST_DAMPING)
        # in the space of residuals there is no J^T J to keep
        if former.keeps_step and not linear.in_residual_space:
            matrix, gradient = linear.after(change, new_residuals)
            former.past = Past(matrix, gradient, parameters, (loss, new_loss), agreement)
        write_vector(problem.trainable, parameters)
        share = 1 - new_loss / loss
        return LevenbergMarquardtStep(new_loss, self.damping, True, attempts, decrease=share, losses=new_losses)

    def _make_problem(self, terms: list[Term]) -> LeastSquares:
        trials = self._held_trials | self._trials
        return LeastSquares(self.model, terms, self.memory, trials, self._shards)

    def _refuse(self, error: str, losses: tuple[float, ...]) -> LevenbergMarquardtStep:
        """Warn that there is no step, and return its record. The damping stays."""
        # the level is that of the caller of `step`, behind its decorator
        warnings.warn(f"Step refused: {error}", RuntimeWarning, stacklevel=4)
        return LevenbergMarquardtStep(sum(losses), self.damping, False, reason=error, losses=losses)

    @torch.inference_mode(False)
    def fit(
        self,
        terms: Iterable[Term] | Callable[[int], Iterable[Term]],
        steps: int = 100,
        *,
        held: Iterable[Term] = (),
        tolerance: float = 0.0,
        patience: int = 5,
        callback: Callable[[int, LevenbergMarquardtStep], Any] | None = None,
        progress: bool = True,
    ) -> list[LevenbergMarquardtStep]:
        """Take steps until one is not accepted, or an argument stops the training.

        Args:
            terms: As for `step`, or a function of the step's number that returns terms (new points for each step).
            steps: The most steps.
            held: Terms on other rows, which are evaluated after each step and not trained: they show if steps fit
                only the trained rows. The model ends with the parameters of the least held loss, which may be the
                initial ones.
            tolerance: The `decrease` below which a step counts as slow. With `held`, a step without a new minimum of
                the held loss counts as slow instead.
            patience: Stop after this many slow steps in a row.
            callback: Called with the number of the step and its record. The training stops if it returns True.
            progress: Whether to show a bar.

        Returns:
            One record for each step.
        """
        from tqdm.auto import tqdm

        terms = terms if callable(terms) else check_terms(terms)
        held = list(held)
        best = None  # the problem whose start has the least held loss
        least = math.inf
        if held:
            held = check_terms(held)
            best, residuals = self.evaluate_held(held)
            held_loss = sum(best.losses(residuals))
            if not math.isnan(held_loss):
                least = held_loss
            message = best.find_not_finite(residuals)
            if message:
                warnings.warn(f"Held-out {message}", RuntimeWarning, stacklevel=3)

        history = []
        slow_steps = 0
        is_hidden = not (progress and self._shards.is_first)
        with tqdm(total=steps, unit="step", desc="Levenberg-Marquardt", disable=is_hidden) as bar:
            for number in range(steps):
                terms_of_step = terms(number) if callable(terms) else terms
                record = self.step(terms_of_step)
                shown = {"loss": record.loss, "damping": record.damping}
                is_slow = record.decrease < tolerance
                if held:
                    problem, residuals = self.evaluate_held(held)
                    record = record._replace(held_losses=problem.losses(residuals))
                    shown["held"] = record.held_loss
                    is_slow = not record.held_loss < least  # also if it is NaN
                    if not is_slow:
                        best = problem
                        least = record.held_loss
                history.append(record)
                bar.update()
                bar.set_postfix(shown)

                slow_steps = slow_steps + 1 if is_slow else 0
                is_stopped = callback is not None and callback(number, record) is True
                is_over = is_stopped or not record.accepted or record.loss == 0 or slow_steps >= patience
                # a callback may stop one process only: then all stop
                if any(self._shards.gather(is_over)):
                    break
        if best is not None:
            write_vector(best.trainable, best.start)
        return history

    def evaluate_held(self, terms: list[Term]) -> tuple[LeastSquares, Tensor]:
        """Return the problem of checked terms that are not trained, and its residuals."""
        problem = self._make_problem(terms)
        self._held_trials = problem.trials
        residuals = problem.residuals(problem.start)
        return problem, residuals


def damping_factor(agreement: float, raised: bool) -> float:
    """Return the factor of the damping after an accepted step.

    Args:
        agreement: The decrease of the loss, as a multiple of the predicted one.
        raised: Whether the damping was raised in this step: less damping has just failed.
    """
    if agreement > 0.75:
        return 0.5 if raised else 0.1
    return 0.5 if agreement > 0.25 else 2.0
