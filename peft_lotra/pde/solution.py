# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The solution of a PDE, and the report of how it was trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from ..modules.report import Report, TextTable
from .boxes import Inside, contains
from .constraints import HardConstraint


class Phase(NamedTuple):
    """A part of the training of `solve`.

    Attributes:
        name: "continuation", "coarse" or "fine".
        parameter: That of the equation; NaN without continuation.
        steps, seconds: How long it took.
        loss: The last loss, the weighted mean square of the residual at the points.
        held: The least mean square of the residual at the points that are held out.
        reason: "solved" (the next parameter can come), "budget", "stalled" (the residual that is held out has
            stopped to fall), "refused" (no step lowers the loss) or "callback" (it returned True).
    """

    name: str
    parameter: float
    steps: int
    seconds: float
    loss: float
    held: float
    reason: str


@dataclass
class Solution(Report):
    """What `solve` found; `print` shows how.

    Attributes:
        model: The `HardConstraint` network: x (..., I) in the coordinates of the box to u (..., O), float64.
        low, high: The ends of the box, (I,).
        inside: The part of the box where the equation holds; None for all of it.
        first_residual, residual: The root mean square of the residual at points that are never trained, before the
            training and after it.
        history: The record of each step.
        phases: The parts of the training.
        notes: What was noticed: activations outside of grids, grids that were not refined.
    """

    model: HardConstraint
    low: Tensor
    high: Tensor
    inside: Inside | None = None
    first_residual: float = math.nan
    residual: float = math.nan
    history: list[LevenbergMarquardtStep] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values, without the model and `inside`."""
        values = super().as_dict()
        del values["model"], values["inside"]
        return values

    def _table(self) -> TextTable:
        columns = ["phase", ">parameter", ">steps", ">seconds", ">loss", ">held out", "ended by"]
        form = "{:s} {:.3g} {:d} {:.1f} {:.1e} {:.1e}"
        rows = [[*form.format(*phase[:-1]).replace("nan", "-").split(), phase.reason] for phase in self.phases]
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        note = (
            f"{count:,} parameters. Residual between the points (root mean square): {self.residual:.1e}, "
            f"{self.first_residual:.1e} at the start."
        )
        return TextTable(columns, rows, [note, *self.notes])

    def plot(self, count: int = 101) -> Any:
        """Draw the first output over the first two coordinates, the others in the middle of the box, or over a line.

        Points that are not inside stay blank.

        Needs matplotlib; `peft_lotra.plotting.plot_history(result.history)` draws the steps.
        """
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
        share = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(1)
        lines = torch.lerp(self.low, self.high, share).unbind(1)[:2]
        x = ((self.low + self.high) / 2).repeat(count ** len(lines), 1)
        x[:, : len(lines)] = torch.cartesian_prod(*lines).view(-1, len(lines))
        u = self.model(x)[:, 0].detach()
        if self.inside is not None:
            u[~contains(self.inside, x)] = math.nan
        if len(lines) == 1:
            axis.plot(*lines, u)
            axis.set(xlabel="coordinate 0", ylabel="u")
        else:
            figure.colorbar(axis.pcolormesh(*lines, u.view(count, count).T, cmap="RdBu_r"))
            axis.set(title="u", xlabel="coordinate 0", ylabel="coordinate 1")
        return figure
