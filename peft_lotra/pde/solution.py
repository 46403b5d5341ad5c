# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The solution of a PDE, and the report of how it was trained."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from ..modules.folders import naming_damage
from ..modules.report import Report, TextTable
from .boxes import Inside, check_box, contains, spread_points
from .constraints import HardConstraint
from .features import BoxFeatures
from .networks import first_module, prepare_network
from .saving import FILE, POINTS, build_model, read_file, save_model
from .unknowns import Estimate


class Phase(NamedTuple):
    """The record of a phase of the training of `solve`.

    Attributes:
        name: "continuation", "start" (one of several, see `solve`), "coarse" or "fine".
        parameter: The parameter of the equation; NaN without continuation.
        steps, seconds: The number of steps, and the time that they took.
        loss: The last loss, the weighted mean square of the residual at the points.
        held: The smallest mean square of the residual at the held-out points.
        reason: Why it ended: "solved" (the next parameter can come), "budget", "stalled" (the held-out residual no
            longer falls), "refused" (no step lowers the loss) or "callback" (it returned True).
        network: The first layer of the network that `solve` made, "splines" or "tanh", and the window in time; empty
            for a network of the caller.
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
        notes.append(
            f"{count:,} parameters. Residual between the points (root mean square): {self.residual:.1e}, "
            f"{self.first_residual:.1e} at the start."
        )
        return TextTable(columns, rows, notes + self.notes)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the solution into `solution.safetensors`: the tensors, and all else as JSON in its header.

        Numbers, `BoxDistance` and networks of modules of `torch.nn` and `peft_lotra.kan` are saved by value. Pass
        other functions and networks, such as adapted ones, to `load` again.

        Args:
            folder: It is made if there is none; its other files stay, and an error changes nothing.

        Raises:
            OSError: `folder` is a file.
            TypeError: `folder` is no path.

        Example:
            >>> import tempfile, torch
            >>> from peft_lotra.kan import jet
            >>> from peft_lotra.pde import BoxDistance, Solution, solve
            >>> box = BoxDistance([0], [10])
            >>> def poisson(model, x):
            ...     return jet(model, x)[2][0] + 1
            >>> result = solve(poisson, [0], [10], distance=box, steps=1, progress=False)
            >>> folder = tempfile.mkdtemp()
            >>> result.save(folder)
            >>> loaded = Solution.load(folder)
            >>> x = torch.rand(5, 1).double()
            >>> torch.equal(loaded.model(x), result.model(x))
            True
        """
        features = first_module(self.model, BoxFeatures)
        periodic = [] if features is None else features.periodic
        points = spread_points(self.low, self.high, POINTS)
        mask = None if self.inside is None else contains(self.inside, points).tolist()
        settings = {**self.as_dict(), "periodic": periodic, "inside": mask}
        save_model(folder, self.model, points, settings)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        distance: Callable[[Tensor], Tensor] | None = None,
        lift: Callable[[Tensor], Tensor] | None = None,
        inside: Inside | None = None,
        network: nn.Module | None = None,
    ) -> Solution:
        """Read a solution that `save` wrote. No code of the folder is executed.

        Args:
            folder: The folder.
            distance, lift, inside: The functions of `solve`, if the folder does not hold them.
            network: The `network` of `solve`, if the folder does not hold it. It is filled in place, with its
                adapters, and becomes float64. Give it the grids of the saved one by `refine_grid`.

        Returns:
            The solution, in evaluation mode.

        Raises:
            ValueError: The folder holds no solution, or a damaged one. An argument is missing, or it has other
                tensors, or other values at points of the box, than when the solution was saved.
        """
        record, tensors = read_file(folder)
        with naming_damage(os.path.join(folder, FILE)):
            plain = {entry.name: record[entry.name] for entry in fields(cls)}
            values = _restore(dict, plain)
            low, high = check_box(values["low"], values["high"])
            values["history"] = [_restore(LevenbergMarquardtStep, step) for step in values["history"]]
            values["phases"] = [_restore(Phase, phase) for phase in values["phases"]]
            unknowns = values["unknowns"].items()
            values["notes"] = list(values["notes"])
            values["unknowns"] = {name: _restore(Estimate, constant) for name, constant in unknowns}
        points = spread_points(low, high, POINTS)
        mask = None if inside is None else contains(inside, points).tolist()
        if mask != record["inside"]:
            raise ValueError("`inside` is not that of the saved solution. Pass the one that `solve` got, if any.")
        if network is not None:
            network = prepare_network(network, BoxFeatures(values["low"], values["high"], record["periodic"]))
        arguments = {"distance": distance, "lift": lift, "network": network}
        replacements = {name: value for name, value in arguments.items() if value is not None}
        model = build_model(record["model"], tensors, points, replacements)
        values |= {"model": model, "low": low, "high": high, "inside": inside}
        return cls(**values)

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


def _restore(cls: Any, record: dict[str, Any]) -> Any:
    """Return a record from its values in JSON, which has neither NaN nor tuples."""
    values = {}
    for name, value in record.items():
        if value is None:
            value = math.nan
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)
