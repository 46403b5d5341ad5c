# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What `fit_adapter` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor

from ..modules.report import Report, TextTable
from ..plotting.pictures import new_figure
from .training import is_better, standard_error


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SUBJECTS = {
    "base": "the scaled base",
    "path": "the linear path",
    "adapter": "the adapter on the path",
    "full": "full fine-tuning",
}


@dataclass(eq=False)
class AdapterFit(Report):
    """The model that `fit_adapter` chose, and what it was compared with; prints as a table.

    Attributes:
        model: The adapted [`LinearPath`] around the base, as `get_peft_model` makes it.
        chosen: The rung of the model: "base", "path" or "adapter".
        advice: Why, in one or two sentences.
        scores: The mean loss of held-out rows of each rung, and of "full", all parameters trained.
        errors: The standard errors of the differences between the scores and the one of the chosen rung.
        seconds: How long it took.
    """

    model: PeftModel
    chosen: str
    advice: str
    scores: dict[str, float]
    errors: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values, without the model."""
        values = super().as_dict()
        del values["model"]
        return values

    def _table(self) -> TextTable:
        rows = []
        for name, score in self.scores.items():
            error = f"{self.errors[name]:.2g}" if self.errors[name] else ""
            mark = "chosen" if name == self.chosen else ""
            rows.append([name, f"{score:.4g}", error, mark])
        return TextTable(["", ">held-out loss", ">+-", ""], rows, [self.advice, f"{self.seconds:.1f} s"])

    def plot(self) -> Figure:
        """Draw the scores with their standard errors; needs matplotlib."""
        figure = new_figure((5, 2.5))
        axis = figure.subplots()
        names = list(self.scores)
        colors = ["tab:green" if name == self.chosen else "0.6" for name in names]
        widths = list(self.scores.values())
        errors = list(self.errors.values())
        axis.barh(names, widths, xerr=errors, color=colors)
        axis.invert_yaxis()
        axis.set(xlabel="loss of held-out rows", title=f"chosen: {self.chosen}")
        return figure


def advise(
    losses: dict[str, Tensor],
    chosen: str,
) -> tuple[str, dict[str, float], dict[str, float]]:
    """Say why a rung was chosen, given the losses (rows,) of held-out rows by name.

    Returns:
        The sentences, and the scores and errors by name.
    """
    scores = {name: values.mean().item() for name, values in losses.items()}
    errors = {name: standard_error(values, losses[chosen]) for name, values in losses.items()}
    advice = f"Use {_SUBJECTS[chosen]}: "
    if chosen == "base":
        advice += "what was fitted is not reliably better."
    else:
        change = (scores["base"] - scores[chosen]) / abs(scores["base"] or 1.0)
        advice += f"it has {change:.0%} less loss than {_SUBJECTS['base']}."
    if is_better(losses["full"], losses[chosen]):
        change = (scores[chosen] - scores["full"]) / abs(scores[chosen] or 1.0)
        advice += f" Full fine-tuning has {change:.0%} less loss: train all parameters if you can store them."
    return advice, scores, errors
