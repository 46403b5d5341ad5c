# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What `fit_adapter` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from ..bank.bank import AdapterBank
from ..modules.report import Report, TextTable
from ..plotting.pictures import new_figure
from ..tucker import Rank
from .starts import Size
from .training import are_within_error, standard_error


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SUBJECTS = {
    "base": "The base as it is",
    "linear": "A linear model",
    "adapter": "The adapter",
    "last layer": "The last layer alone",
    "full": "Full fine-tuning",
    "scratch": "The same network from scratch",
}


class Chosen(NamedTuple):
    """The ranks of an adapter by layer, and the learning rate, 0 for no adaptation."""

    ranks: dict[str, tuple[Rank, ...]]
    rate: float


@dataclass(eq=False)
class AdapterFit(Report):
    """The adapter that `fit_adapter` chose, and the references it was compared with; prints as a table.

    Attributes:
        model: The adapted base, as `get_peft_model` makes it.
        bank: With `ensemble`, an [`AdapterBank`] of the adapters of the folds; None if no adaptation was best.
        chosen: The ranks by layer, and the learning rate.
        advice: The model to use: "base", "linear", "adapter", "last layer", "full" or "scratch".
        reason: Why, in one sentence.
        scores: By the same names, the mean loss of the rows that the folds held out.
        errors: The standard errors of the differences between the scores and the least one within `max_bytes`.
        rates: The learning rates with these losses.
        sizes: The parameters that are stored for the task, and the bytes of their safetensors file.
        notes: Further remarks.
        seconds: How long it took.
    """

    model: PeftModel
    bank: AdapterBank | None
    chosen: Chosen
    advice: str
    reason: str
    scores: dict[str, float]
    errors: dict[str, float]
    rates: dict[str, float]
    sizes: dict[str, Size]
    notes: list[str]
    seconds: float

    @property
    def parameters(self) -> int:
        """The number of parameters of the adapter."""
        return self.sizes["adapter"].parameters

    @property
    def bytes(self) -> int:
        """The size of adapter_model.safetensors."""
        return self.sizes["adapter"].bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values, without the models."""
        values = super().as_dict()
        del values["model"], values["bank"]
        return values

    def _table(self) -> TextTable:
        rows = []
        for name, score in self.scores.items():
            parameters, size = self.sizes[name]
            error = f"{self.errors[name]:.2g}" if self.errors[name] else ""
            rows.append([name, f"{score:.4g}", error, f"{parameters:,}", f"{size / 1000:.1f}"])
        rate = self.chosen.rate
        adapter = f"rate {rate:g}" if rate else "no adaptation"
        notes = [
            f"adapter: {adapter}, chosen in {self.seconds:.1f} s",
            *self.notes,
            f"advice: {self.advice}. {self.reason}",
        ]
        return TextTable(["", ">out-of-fold loss", ">+-", ">parameters", ">kB"], rows, notes)

    def plot(self) -> Figure:
        """Draw the scores with their standard errors; needs matplotlib."""
        figure = new_figure((5, 3))
        axis = figure.subplots()
        names = list(self.scores)
        colors = ["tab:green" if name == self.advice else "0.6" for name in names]
        widths = list(self.scores.values())
        errors = list(self.errors.values())
        axis.barh(names, widths, xerr=errors, color=colors)
        axis.set(xlabel="loss of held-out rows", title=f"advice: {self.advice}")
        return figure


def advise(
    losses: dict[str, Tensor],
    sizes: dict[str, Size],
    max_bytes: float = math.inf,
) -> tuple[str, str, dict[str, float], dict[str, float]]:
    """Name the smallest model whose loss is within one standard error of the least one of at most `max_bytes`.

    The error is of the mean difference between the losses (rows,) of two models.

    Returns:
        The name, one sentence why, and the scores and errors by name, smallest model first.
    """
    names = sorted(losses, key=lambda name: sizes[name].bytes)
    scores = {name: losses[name].mean().item() for name in names}
    small = [name for name in names if sizes[name].bytes <= max_bytes]
    best = min(small, key=scores.__getitem__)
    least = losses[best]
    errors = {name: standard_error(losses[name], least) for name in names}
    advice = next(name for name in small if are_within_error(losses[name], least))

    subject = f"{_SUBJECTS[advice]} ({sizes[advice].bytes / 1000:.1f} kB)"
    score = scores["adapter"]
    change = (scores[advice] - score) / abs(score or 1.0)
    if advice == "adapter":
        reason = f"{subject} is within one standard error of the least loss, and nothing smaller is."
    elif sizes[advice].bytes < sizes["adapter"].bytes:
        comparison = "more" if change > 0 else "less"
        reason = f"{subject} is smaller than the adapter, with {abs(change):.0%} {comparison} loss."
    else:
        reason = f"{subject} has {-change:.0%} less loss than the adapter: take it unless the file must be small."
    return advice, reason, scores, errors
