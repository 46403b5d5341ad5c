# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Residuals of former steps, which count less after each step (recursive least squares)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .normal_equations import bytes_of_matrices
from .problem import LeastSquares, Term


# Of `forgetting="auto"`. A span of 20 steps is a factor of 0.95.
LONGEST_SPAN = 20.0
SMALLEST_FACTOR = 0.1


class Past(NamedTuple):
    """The quadratic model of former residuals, which is right at `parameters`.

    Attributes:
        matrix: J^T J, (P, P).
        gradient: J^T r, (P,).
        parameters: (P,).
        losses: The loss of the last step's rows, before and after it.
        agreement: The decrease of the loss in the last step, as a multiple of the predicted one.
    """

    matrix: Tensor
    gradient: Tensor
    parameters: Tensor
    losses: tuple[float, float]
    agreement: float


class Forgetting:
    """Decides whether former residuals count, and computes their factor.

    Attributes:
        past: The former residuals. None without any.
        uses_past: Whether former residuals count in the present step.
        keeps_step: Whether the residuals of the present step are kept for the next one. The first step of "auto" does
            not know yet if the next rows are other rows.
    """

    def __init__(self) -> None:
        self.past: Past | None = None
        self.uses_past = False
        self.keeps_step = False
        self._terms: list[tuple[Any, float, list[Tensor]]] = []  # of the last step, with copies of the rows
        self._span = 1.0  # steps that count
        self._slope = -1.0  # the mean slope of the log loss

    def start_step(
        self,
        factor: float | str,
        problem: LeastSquares,
        terms: list[Term],
        num_residuals: int,
    ) -> None:
        """Set `uses_past` and `keeps_step`. Drop former residuals that do not count, or are at other parameters."""
        if isinstance(factor, str):
            is_first = not self._terms
            self.uses_past = self._are_rows_drawn(problem, terms, num_residuals)
            self.keeps_step = self.uses_past or is_first
        else:
            self.uses_past = self.keeps_step = factor > 0
        past = self.past
        if past is not None and not (self.uses_past and torch.equal(past.parameters, problem.start)):
            self.past = None

    def _are_rows_drawn(
        self,
        problem: LeastSquares,
        terms: list[Term],
        num_residuals: int,
    ) -> bool:
        """Return whether the terms of the last step have other rows now, at least half as many as parameters."""
        last_terms = self._terms
        self._terms = []
        for function, rows, weight in terms:
            self._terms.append((function, weight, [row.clone() for row in rows]))
        is_same = len(last_terms) == len(self._terms)
        is_drawn = False
        for last, term in zip(last_terms, self._terms, strict=False):
            is_same &= last[:2] == term[:2]
            is_drawn |= not all(map(torch.equal, last[2], term[2]))

        processes = problem.shards.gather((is_same, is_drawn, num_residuals))
        are_same, are_drawn, sizes = zip(*processes, strict=True)
        size = problem.num_parameters
        if size > 2 * sum(sizes) or bytes_of_matrices(size) > problem.memory:
            return False
        return all(are_same) and any(are_drawn)

    def discounted(
        self,
        factor: float | str,
        loss: float,
    ) -> tuple[Tensor, Tensor] | None:
        """Return the former J^T J and J^T r times the forgetting factor.

        By "auto" it is 1 - 1 / span, with a span in steps: times 1.25 where the new rows have 1.5 times the loss of
        those just fitted, else times 0.8. It is at most exp(10 x mean slope of the log loss), since residuals from
        before a fast fall are too large, and at least a factor that nearly always helps. Each call updates the span
        and the slope.

        Args:
            factor: The forgetting factor, or "auto".
            loss: The loss of the new rows, before they are trained.
        """
        past = self.past
        if past is None:
            return None
        trust = 1.0 if past.agreement > 0.25 else 0.2
        if isinstance(factor, str):
            loss_before, loss_after = past.losses
            slope = math.log(max(loss, 1e-300) / loss_before)
            self._slope += 0.2 * (slope - self._slope)
            largest = math.exp(min(0.0, 10 * self._slope))
            largest = min(largest, 1 - 1 / LONGEST_SPAN)
            longest = 1 / (1 - largest)

            growth = 1.25 if loss > 1.5 * loss_after else 0.8
            span = min(self._span * growth, longest)
            self._span = max(1.0, span)
            factor = max(1 - 1 / self._span, SMALLEST_FACTOR * trust)
        else:
            factor *= trust
        return factor * past.matrix, factor * past.gradient
