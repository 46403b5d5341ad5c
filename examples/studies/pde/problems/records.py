# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A JSON file of runs, which interrupted studies continue, and to which several processes add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study_tools import machine


class Record:
    """
    A file with the settings of a study and its runs.

    Args:
        path: of the file.
        empty: what the file has before the first run. `empty["recipe"]` are the settings; a file with others is
            started anew.
    """

    def __init__(self, path: Path, empty: dict) -> None:
        self.path, self.empty = path, json.loads(json.dumps(empty))  # tuples are lists in a file

    def read(self) -> dict:
        if not self.path.exists():
            return json.loads(json.dumps(self.empty))
        before = json.loads(self.path.read_text())
        same = before["recipe"] == self.empty["recipe"]
        return json.loads(json.dumps({**self.empty, **(before if same else {})}))

    def add(self, run: dict, *keys: str) -> None:
        """Adds a run, with the machine and the commit, to the list under these keys."""
        record = self.read()
        place: Any = record
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place.setdefault(keys[-1], []).append(run | {"machine": machine.describe(), "commit": machine.commit()})
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(record) + "\n")
        new.replace(self.path)

    def runs(self, *keys: str) -> list[dict]:
        """The runs under these keys."""
        place: Any = self.read()
        for key in keys:
            place = place.get(key, {})
        return list(place)

    def has(self, seed: int, *keys: str) -> bool:
        return any(run["seed"] == seed for run in self.runs(*keys))
