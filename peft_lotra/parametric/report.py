# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The report of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..report import Report, TextTable
from .interpolation import Member, Point


class FamilyReport(Report, list[Member]):
    """The members that a fit added, or that a file holds, a list that prints as a table.

    Attributes:
        failed: Errors by parameter: of functions of yours, where there is no member, and of members that did not
            converge.
        largest: In a range, the largest indicator of a prediction, as a share of its bound; NaN otherwise.
    """

    def __init__(self, members: Iterable[Member], failed: Mapping[Any, str], largest: float, coordinates: int) -> None:
        super().__init__(sorted(members, key=lambda member: member.parameter))
        self.failed = dict(failed)
        self.largest = largest
        self.coordinates = coordinates

    def _table(self) -> TextTable:
        numbers = [f"{m.predicted:.2e} {m.indicator:.2e} {m.steps} {m.seconds:.2f}" for m in self]
        rows = [
            [text_of(m.parameter), *text.replace("nan", "-").split()] for m, text in zip(self, numbers, strict=True)
        ]
        notes = [f"{len(self)} members of {self.coordinates:,} coordinates"]
        if not math.isnan(self.largest):
            notes.append(f"largest indicator in the range: {self.largest:.2g} of its bound")
        notes += [f"failed: {parameter}: {error}" for parameter, error in self.failed.items()]
        return TextTable(["parameter", ">predicted", ">fitted", ">steps", ">s"], rows, notes)

    def as_dict(self) -> dict[str, Any]:
        """The table in plain values, for JSON, without the coordinates of the members; None for NaN."""
        rows = [{n: None if v != v else v for n, v in m._asdict().items() if n != "vector"} for m in self]
        failed = {str(parameter): error for parameter, error in self.failed.items()}
        largest = None if math.isnan(self.largest) else self.largest
        return {"members": rows, "failed": failed, "largest": largest, "coordinates": self.coordinates}


def text_of(point: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in point)


def ranges_of(points: Sequence[Point]) -> list[str]:
    """The range of each parameter, as text."""
    return [f"{min(axis):g} to {max(axis):g}" for axis in zip(*points, strict=True)]
