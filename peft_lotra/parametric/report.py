# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a fit of a family reports, and its model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from peft import PeftModel

from ..hub.contents import AdapterContents, read_adapter
from ..report import Report, TextTable
from .members import Member, Point, argument
from .storage import Contents, modes_of, opened_family


class FamilyReport(Report, list[Member]):
    """The members that a fit added, a list that prints as a table.

    Attributes:
        failed: The errors of parameters that could not be fitted.
        largest: Of a range, the largest indicator of a prediction, as a share of what it may be; NaN otherwise.
    """

    def __init__(self, members: Iterable[Member], failed: Mapping[Any, str], largest: float, coordinates: int) -> None:
        super().__init__(sorted(members, key=lambda member: member.parameter))
        self.failed = dict(failed)
        self.largest = largest
        self.coordinates = coordinates

    def _table(self) -> TextTable:
        rows = [
            [
                _text(m.parameter),
                f"{m.predicted:.2e}",
                f"{m.indicator:.2e}",
                str(m.steps),
                f"{m.seconds:.2f}",
            ]
            for m in self
        ]
        notes = [f"{len(self)} members of {self.coordinates:,} coordinates"]
        if not math.isnan(self.largest):
            notes.append(f"largest indicator in the range: {self.largest:.2g} of what it may be")
        notes += [f"not fitted: {parameter}: {error}" for parameter, error in self.failed.items()]
        columns = ["parameter", ">predicted", ">fitted", ">steps", ">s"]
        return TextTable(columns, rows, notes)

    def as_dict(self) -> dict[str, Any]:
        """The table in plain values, for JSON, without the coordinates of the members."""
        rows = [{k: v for k, v in m._asdict().items() if k != "vector"} for m in self]
        failed = {str(parameter): error for parameter, error in self.failed.items()}
        return {"members": rows, "failed": failed, "largest": self.largest, "coordinates": self.coordinates}


def _text(point: Point) -> str:
    return ", ".join(f"{value:g}" for value in point)


class FamilyContents(Report):
    """The contents of a saved family, as `peft-lotra inspect` shows them.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        with opened_family(path) as (folder, self.contents):
            shared = AdapterContents.of(str(path), *read_adapter(folder))
        self.layers = [row for row in shared.layers if row.ranks]
        self.bytes = path.stat().st_size

    def _table(self) -> TextTable:
        norms = np.linalg.norm(self.contents.vectors, axis=1)
        members = zip(self.contents.parameters, self.contents.indicators, norms, strict=True)
        rows = [[_text(point), f"{indicator:.2e}", f"{norm:.3g}"] for point, indicator, norm in members]
        layers = ", ".join(f"{row.name} {row.ranks}" for row in self.layers)
        notes = [
            f"{len(rows)} members of {self.contents.vectors.shape[1]:,} coordinates, {self.bytes / 1000:.1f} kB",
            f"adapted layers, with their ranks (out, in, basis): {layers}",
        ]
        return TextTable(["parameter", ">fitted", ">norm"], rows, notes)

    def as_dict(self) -> dict[str, Any]:
        """The contents in plain values, for JSON, without the coordinates of the members."""
        rows = zip(self.contents.parameters, self.contents.indicators, strict=True)
        members = [
            {"parameter": list(point), "indicator": value if math.isfinite(value) else None} for point, value in rows
        ]
        layers = [{"name": row.name, "kind": row.kind, "shape": row.shape, "ranks": row.ranks} for row in self.layers]
        coordinates = self.contents.vectors.shape[1]
        sizes = {"coordinates": coordinates, "bytes": self.bytes}
        return {"members": members, "log": self.contents.log, **sizes, "layers": layers}


def card_of(model: PeftModel, contents: Contents, path: Path) -> ModelCard:
    """The model card of a saved family."""
    points = contents.parameters
    ranges = [f"{min(axis):g} to {max(axis):g}" for axis in zip(*points, strict=True)]
    modes, _ = modes_of(contents.vectors)
    middle = argument(points[len(points) // 2])
    layers = [name for name, _ in model.named_modules() if name.endswith(".lotra_core")]
    return ModelCard(
        "---\nlibrary_name: peft\ntags:\n- kan\n- lotra\n- peft-plugin\n- parametric\n---\n\n"
        "# A family of LoTRA adapters\n\n"
        f"{len(points)} adapters of one Kolmogorov-Arnold network, for parameters from {', and from '.join(ranges)}. "
        f"Between them adapters are predicted without training.\n\n"
        "```python\nfrom peft_lotra import ParametricAdapter\n\n"
        "# `base` is the network that the family was fitted on\n"
        f'family = ParametricAdapter.from_pretrained(base, ".")  # this folder, or the name of the repository\n'
        f"output = family.predict({middle})(x)\n```\n\n"
        "| adapted layers | members | coordinates | modes | bytes of a member | bytes of the file |\n"
        "|--:|--:|--:|--:|--:|--:|\n"
        f"| {len(layers)} | {len(points)} | {contents.vectors.shape[1]:,} | {len(modes)} | {8 * len(modes)} "
        f"| {path.stat().st_size:,} |\n"
    )
