# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The solution of a PDE, and the report of how it was trained."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from ..modules.report import Report, TextTable
from .boxes import Inside, contains
from .constraints import HardConstraint
from .saving import save_network
from .unknowns import Estimate


class Phase(NamedTuple):
    """The record of a phase of the training of `solve`.

    Attributes:
        name: "polynomials", "march" and the time where it ended, "continuation", "start" (of several, see `solve`),
            "coarse" or "fine".
        parameter: The parameter of the equation; NaN without continuation.
        steps, seconds: The number of steps, and the time that they took.
        loss: The last loss, the weighted mean square of the residual at the points.
        held: The smallest mean square of the residual at the held-out points.
        reason: Why it ended: "solved" (the next parameter can come), "budget", "stalled" (the held-out residual no
            longer falls), "refused" (no step lowers the loss) or "callback" (it returned True).
        network: The first layer of the network that `solve` made, "splines" or "tanh", the functions of each
            coordinate, or the number of windows in time; empty for a network of the caller.
    """

    name: str
    parameter: float
    steps: int
    seconds: float
    loss: float
    held: float
    reason: str
    network: str = ""


@dataclass
class Solution(Report):
    """The solution of `solve`. Print it for a report of the training.

    Attributes:
        model: The `HardConstraint` network: x (..., I) in the coordinates of the box to u (..., O), float64.
        low, high: The ends of the box, (I,).
        inside: The part of the box where the equation holds; None for all of it.
        first_residual, residual: The root mean square of the residual at points that are never trained, before the
            training and after it.
        error: The estimate of the relative L2 error of the model, |u - exact| / |exact|; NaN if it is not known.
        history: The record of each step.
        phases: The parts of the training.
        notes: Remarks on the solution, such as its warnings, or grids that were not refined.
        unknowns: The estimates of unknown constants, by name.
    """

    model: HardConstraint
    low: Tensor
    high: Tensor
    inside: Inside | None = None
    first_residual: float = math.nan
    residual: float = math.nan
    error: float = math.nan
    history: list[LevenbergMarquardtStep] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unknowns: dict[str, Estimate] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values, without the model and `inside`."""
        values = super().as_dict()
        del values["model"], values["inside"]
        return values

    def _table(self) -> TextTable:
        columns = ["phase", ">parameter", ">steps", ">seconds", ">loss", ">held out", "ended by", "network"]
        form = "{:.3g} {:d} {:.1f} {:.1e} {:.1e}"
        rows = []
        for name, *numbers, reason, network in self.phases:
            cells = form.format(*numbers).replace("nan", "-").split()
            rows.append([name, *cells, reason, network])

        notes = []
        for name, (value, error) in self.unknowns.items():
            notes.append(f"{name} = {value:.6g} +- {error:.2g}")
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if math.isnan(self.error):
            notes.append("The error is not known.")
        else:
            notes.append(f"Relative error (L2), estimated: {self.error:.1e}.")
        notes.append(
            f"{count:,} parameters. Residual between the points (root mean square): {self.residual:.1e}, "
            f"{self.first_residual:.1e} at the start."
        )
        return TextTable(columns, rows, notes + self.notes)

    def save(self, path: str | os.PathLike) -> None:
        """Write the network into a `.safetensors` file, for `load_network`. Conditions stay in your code."""
        save_network(self.model.kan, path)

    def plot(self, count: int = 101) -> Any:
        """Draw the first output over the first two coordinates, the others in the middle of the box, or over a line.

        Points that are not inside stay blank.

        Needs matplotlib; `peft_lotra.plotting.plot_history(result.history)` draws the steps.
        """
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
        share = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(1)
        lines = list(torch.lerp(self.low, self.high, share).T)
        middle = (self.low + self.high) / 2
        lines[2:] = middle[2:].unsqueeze(1)
        x = torch.cartesian_prod(*lines).view(-1, len(lines))
        u = self.model(x)[:, 0].detach()
        if self.inside is not None:
            u[~contains(self.inside, x)] = math.nan
        if len(lines) == 1:
            axis.plot(*lines, u)
            axis.set(xlabel="coordinate 0", ylabel="u")
        else:
            image = u.view(count, count).T
            mesh = axis.pcolormesh(*lines[:2], image, cmap="RdBu_r")
            figure.colorbar(mesh)
            axis.set(title="u", xlabel="coordinate 0", ylabel="coordinate 1")
        return figure
