# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt for adapters, and for any model whose trainable parameters are few enough."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules.calls import check_module
from ..modules.checks import check_count, check_number
from .normal_equations import LinearModel, bytes_of_matrices
from .problem import Known, LeastSquares, Term, check_terms, check_trainable
from .shards import Shards


LARGEST_DAMPING = 1e12  # at which a step gives up
SMALLEST_DAMPING = 1e-16  # less is lost in the rounding of the normal equations
SMALLEST_WITH_PAST = 1e-7  # damping with `forgetting`: less fits the rows of one step alone
LONGEST_SPAN, SMALLEST_FACTOR = 20.0, 0.1  # of `forgetting="auto"`; a span of 20 steps is a factor of 0.95


class LevenbergMarquardtStep(NamedTuple):
    """The record of one step.

    Attributes:
        loss: The loss of the parameters that the model now has; NaN or infinite if a residual is.
        damping: The damping that the next step starts with.
        accepted: Whether the parameters changed.
        attempts: The number of damped systems that were solved.
        decrease: The decrease of the loss, as a share of the loss.
        reason: Why the parameters did not change; empty if they did.
        losses: The part of the loss of each term, weight included, in the order of the terms.
        held_losses: The same of terms that are held out, see `fit`.
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
        """The loss of all terms that are held out; NaN without any."""
        return sum(self.held_losses) if self.held_losses else math.nan


class _Past(NamedTuple):
    """The quadratic model of the residuals of former steps, at the parameters of the model."""

    matrix: Tensor  # (P, P)
    gradient: Tensor  # (P,)
    parameters: Tensor  # (P,), where this model is right
    losses: tuple[float, float]  # of the last step's rows, before and after it
    agreement: float  # of the decrease in the last step with the predicted one


class LevenbergMarquardt:
    r"""Trains a model on a sum of squares, sum_t weight_t mean_n |r_t(row_n)|^2, by damped Gauss-Newton steps.

    With all residuals in a vector r, each multiplied by sqrt(weight_t / n_t), and their Jacobian J, a step solves

        (J^T J + damping S) step = -J^T r,

    or the same in the space of the residuals if they are fewer than the parameters. S is the diagonal of J^T J,
    bounded from below. Everything is in float64, and outside of `torch.inference_mode`.
    docs/notes/log.md says how J is computed, and what to choose.

    Args:
        model: Any model; the parameters that require a gradient are trained.
        damping: The damping that the first step tries.
        floor: The lower bound of S, as a share of its largest entry.
        forgetting: The factor, from 0 to below 1, by which residuals of former steps count less after each step
            (recursive least squares), for rows that are drawn anew before each step. By "auto" it is larger where
            steps fit their own rows alone and smaller where the loss falls fast; it is 0 where rows are those of the
            step before, or less than half of the parameters, or a function or weight is another. It keeps a matrix of
            all parameters, which `forget` drops when the problem changes.
        memory: Bytes that matrices and chunks of rows may take.
        group: A process group of `torch.distributed`, e.g. `torch.distributed.group.WORLD`, whose processes have the
            same model and each its own rows of all terms, possibly none. J^T J, J^T r and losses are summed over them.

    Attributes:
        damping: The damping that the next step tries. The other arguments are attributes too.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: No parameter requires a gradient, or an argument is out of range.

    Source: J. J. More, "The Levenberg-Marquardt algorithm" (1978); for the forgetting factor, L. Ljung and T.
    Soderstrom, "Theory and Practice of Recursive Identification" (1983).
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
        self.damping = check_number(damping, "damping", "(0, inf)")
        self.floor = check_number(floor, "floor", "(0, 1]")
        self.forgetting = forgetting if forgetting == "auto" else check_number(forgetting, "forgetting", "[0, 1)")
        self.memory = int(check_number(memory, "memory", "[1048576, inf)"))
        self._shards = Shards(group)
        self._known: Known = {}  # the terms of the last step
        self._known_held: Known = {}  # those held out after it
        self._past: _Past | None = None
        # of the last step, with `forgetting="auto"`: function, weight, and the rows as they were then
        self._terms: list[tuple[Any, float, list[Tensor]]] = []
        self._span, self._slope = 1.0, -1.0  # steps that count, and the mean slope of the log loss

    def forget(self) -> None:
        """Drop the residuals of former steps, see `forgetting`: after a change of the terms, or of the parameters."""
        self._past = None

    @torch.inference_mode(False)
    def step(self, terms: Iterable[Term]) -> LevenbergMarquardtStep:
        """Take one step. A step that is not accepted leaves the parameters unchanged bit for bit.

        Args:
            terms: Residual terms (function, rows, weight). `function(model, *rows)` is called with any number n of
                rows and returns n residuals, or (n, m) for m in each row, which do not depend on the other rows.
                `rows` are tensors of equal length; `weight` is a positive number, 1 if left out.

        Returns:
            The record of the step. It is not accepted if the residuals are not finite (a warning names the term, the
            damping stays), or if no damping makes the loss fall.

        Raises:
            ValueError: A term is malformed, random (dropout in training mode), or depends on other rows (batch
                normalization in training mode); or the matrices do not fit into `memory`; with `group`, the terms or
                the parameters differ between the processes, or no process has rows of a term.
            RuntimeError: A function failed in another process of `group`.

        Example:
            >>> from peft_lotra.kan import KAN, jet
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
        terms = self._check(terms)
        problem, residuals = self._evaluate(terms)
        self._known = problem.known
        losses = problem.losses(residuals)
        loss = sum(losses)
        is_first = not self._terms  # before `_remembers` fills them
        remembers = self._remembers(problem, terms, len(residuals))
        if self._past is not None and not (remembers and torch.equal(self._past.parameters, problem.start)):
            self.forget()
        error = next(filter(None, self._shards.gather(problem.find_not_finite(residuals))), "")
        if not error:
            past = self._past and self._discounted(self._past, loss)
            linear = LinearModel(problem, residuals, self.floor, past, in_parameter_space=remembers)
            error = linear.error
        if error:
            warnings.warn(f"Step refused: {error}", RuntimeWarning, stacklevel=3)
            return LevenbergMarquardtStep(loss, self.damping, False, reason=error, losses=losses)

        damping, growth, attempts = self.damping, 2.0, 0
        while damping <= LARGEST_DAMPING:
            attempts += 1
            step = linear.solve(damping)
            if step is not None:
                candidate = problem.round(problem.start + step)
                change = candidate - problem.start
                new_residuals = self._shards.run(problem.residuals, candidate)
                new_losses = problem.losses(new_residuals)
                new_loss = sum(new_losses)
                decrease = loss - new_loss - linear.rise_of_past(change)
                if new_loss < loss and decrease > 0:  # not if one is NaN
                    agreement = decrease / linear.predicted_decrease(damping, step)
                    damping *= damping_factor(agreement, raised=attempts > 1)
                    self.damping = max(damping, SMALLEST_WITH_PAST if remembers else SMALLEST_DAMPING)
                    # whether the next rows are drawn anew is not known yet
                    if remembers or (is_first and not linear.in_residual_space and self.forgetting == "auto"):
                        sums = linear.after(change, new_residuals)
                        self._past = _Past(*sums, candidate, (loss, new_loss), agreement)
                    problem.write(candidate)
                    share = 1 - new_loss / loss
                    return LevenbergMarquardtStep(new_loss, self.damping, True, attempts, share, losses=new_losses)
            damping *= growth
            growth *= 2
        reason = (
            f"No damping up to {LARGEST_DAMPING:g} makes the loss fall below {loss:.6g}: the parameters are at a "
            "minimum to rounding, or the normal equations are singular."
        )
        return LevenbergMarquardtStep(loss, self.damping, False, attempts, reason=reason, losses=losses)

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
        """Take steps until a step is not accepted, or an argument stops it.

        Args:
            terms: As for `step`, or a function of the step's number that returns terms (new points for each step).
            steps: The most steps.
            held: Terms on other rows, which are evaluated after each step and not trained: they show a fit of the
                trained rows only. The model ends with the parameters of the least held loss, perhaps those before the
                first step.
            tolerance, patience: Stop when `decrease` was below `tolerance` in `patience` steps in a row; with held
                terms, when the held loss had no new minimum in `patience` steps in a row.
            callback: Called with the number of the step and its record; stops if it returns True.
            progress: Whether to show a bar.

        Returns:
            One record for each step.
        """
        from tqdm.auto import tqdm

        history: list[LevenbergMarquardtStep] = []
        steps = check_count(steps, "steps", low=0)
        check_number(tolerance, "tolerance", "[0, inf)")
        slow = 0
        shards = self._shards
        terms = terms if callable(terms) else self._check(terms)
        held = list(held)
        best, least = None, math.inf
        if held:
            held = self._check(held)
            best, residuals = self.evaluate_held(held)
            least = min(least, sum(best.losses(residuals)))  # infinite if that is NaN
            if message := best.find_not_finite(residuals):
                warnings.warn(f"Held-out {message}", RuntimeWarning, stacklevel=3)
        hidden = not (progress and shards.is_first)
        with tqdm(total=steps, unit="step", desc="Levenberg-Marquardt", disable=hidden) as bar:
            for number in range(steps):
                record = self.step(shards.run(terms, number) if callable(terms) else terms)
                shown = {"loss": record.loss, "damping": record.damping}
                progressed = record.decrease >= tolerance
                if held:
                    problem, residuals = self.evaluate_held(held)
                    record = record._replace(held_losses=problem.losses(residuals))
                    shown["held"] = record.held_loss
                    progressed = record.held_loss < least
                    if progressed:
                        least, best = record.held_loss, problem
                history.append(record)
                bar.update()
                bar.set_postfix(shown)
                slow = 0 if progressed else slow + 1
                stop = callback is not None and shards.run(callback, number, record) is True
                # a loss of zero is as low as it gets
                if any(shards.gather(stop or not record.accepted or not record.loss or slow >= patience)):
                    break
        if best is not None:
            best.write(best.start)
        return history

    def evaluate_held(self, terms: list[Term]) -> tuple[LeastSquares, Tensor]:
        """Return the problem of checked terms that are not trained, and its residuals."""
        problem, residuals = self._evaluate(terms)
        self._known_held = problem.known
        return problem, residuals

    def _evaluate(self, terms: list[Term]) -> tuple[LeastSquares, Tensor]:
        """Return the least-squares problem of checked terms, and its residuals."""
        problem = LeastSquares(self.model, terms, self.memory, self._known_held | self._known, self._shards)
        return problem, self._shards.run(problem.residuals, problem.start)

    def _check(self, terms: Iterable[Term]) -> list[Term]:
        """Check terms; a process of several may have no rows."""
        return self._shards.run(check_terms, terms, int(self._shards.group is None))

    def _remembers(self, problem: LeastSquares, terms: list[Term], count: int) -> bool:
        """Return whether residuals of former steps count in this one, and keep its terms to compare the next ones."""
        if not isinstance(self.forgetting, str):
            return self.forgetting > 0
        before = self._terms
        self._terms = [(function, weight, [row.clone() for row in rows]) for function, rows, weight in terms]
        is_same = not before or [term[:2] for term in before] == [term[:2] for term in self._terms]
        is_drawn = any(
            not all(map(torch.equal, old[2], new[2])) for old, new in zip(before, self._terms, strict=False)
        )
        are_same, are_drawn, counts = zip(*self._shards.gather((is_same, is_drawn, count)), strict=True)
        size = problem.num_parameters
        fits = size <= 2 * sum(counts) and bytes_of_matrices(size) <= self.memory
        return fits and all(are_same) and any(are_drawn)

    def _discounted(self, past: _Past, loss: float) -> tuple[Tensor, Tensor]:
        """Multiply the former J^T J and J^T r by the forgetting factor; rows not trained yet have this loss.

        By "auto" it is 1 - 1 / span, with a span in steps: times 1.25 where the new rows have 1.5 times the loss of
        those just fitted, else times 0.8. It is at most exp(10 x mean slope of the log loss), since residuals from
        before a fast fall are too large, and at least a factor that nearly always helps. Each call updates the span
        and the slope.
        """
        trust = 1.0 if past.agreement > 0.25 else 0.2
        if isinstance(self.forgetting, str):
            before, after = past.losses
            self._slope += 0.2 * (math.log(max(loss, 1e-300) / before) - self._slope)
            longest = 1 / (1 - min(1 - 1 / LONGEST_SPAN, math.exp(min(0.0, 10 * self._slope))))
            self._span = max(1.0, min(self._span * (1.25 if loss > 1.5 * after else 0.8), longest))
            factor = max(1 - 1 / self._span, SMALLEST_FACTOR * trust)
        else:
            factor = self.forgetting * trust
        return factor * past.matrix, factor * past.gradient


def damping_factor(agreement: float, raised: bool) -> float:
    """Return the factor of the damping after a step whose decrease is `agreement` times the predicted one.

    If the damping was just `raised`, less damping has just failed.
    """
    if agreement > 0.75:
        return 0.5 if raised else 0.1
    return 0.5 if agreement > 0.25 else 2.0
