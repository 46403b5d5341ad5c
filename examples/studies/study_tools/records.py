# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A JSON file of runs, which interrupted studies continue, and to which several processes add."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft_lotra.pde.solution import Solution
from study_tools import files, machine


class Record:
    """A file with the settings of a study and its runs.

    Args:
        path: The file.
        empty: The content before the first run. `empty["recipe"]` are the settings; a file with other settings is
            started from scratch.
    """

    def __init__(self, path: Path, empty: dict) -> None:
        self.path = path
        self.empty = json.loads(json.dumps(empty))  # tuples are lists in a file

    @classmethod
    def of(cls, args: argparse.Namespace, name: str, recipe: dict, **fields: Any) -> Record:
        """Return the record of a study in the folder `args.output`; one of `--quick` starts from scratch."""
        path = files.path_of(args, name)
        if args.quick:
            path.unlink(missing_ok=True)
        return cls(path, {"recipe": recipe, **fields, "results": {}})

    def read(self) -> dict:
        content = copy.deepcopy(self.empty)
        saved = files.read(self.path)
        if saved and saved["recipe"] == self.empty["recipe"]:
            content.update(saved)
        return content

    def add(self, run: dict, *keys: str) -> None:
        """Add a run, with the machine and the commit, to the list under these keys."""
        content = self.read()
        group: Any = content
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        runs = group.setdefault(keys[-1], [])
        runs.append(run | {"machine": machine.describe(), "commit": machine.commit()})
        files.replace(self.path, content, indent=None)

    def runs(self, *keys: str) -> list[dict]:
        """Return the runs under these keys."""
        group: Any = self.read()
        for key in keys:
            group = group.get(key, {})
        return list(group)

    def has(self, seed: int, *keys: str) -> bool:
        return any(run["seed"] == seed for run in self.runs(*keys))

    def complete(self, runs: Iterable[tuple], measure: Callable[..., dict], group: str = "results") -> None:
        """Measure the runs that the file lacks, and add each as soon as it has ended.

        Args:
            runs: The seed and the keys of each run.
            measure: Returns the run of `measure(seed, *keys)`.
            group: The first key.
        """
        for seed, *keys in runs:
            if self.has(seed, group, *keys):
                continue
            run = measure(seed, *keys)
            self.add(run, group, *keys)
            numbers = {name: value for name, value in run.items() if isinstance(value, int | float)}
            print(
                f"{', '.join(keys)}: {', '.join(f'{name} {value:.3g}' for name, value in numbers.items())}", flush=True
            )

    def write_page(self, markdown: Callable[[dict], str]) -> None:
        """Write the Markdown of the record beside it."""
        files.write_page(self.path, markdown(self.read()))


def on_cpu_clock(solve: Callable[[], Solution]) -> tuple[Solution, dict]:
    """Run `solve` with a budget of CPU seconds, and return what a record keeps of it.

    Seconds on the wall of a busy machine are not the same for all runs.
    """
    start = time.process_time()
    with patch("time.monotonic", time.process_time):
        solution = solve()
    seconds = time.process_time() - start
    return solution, {"residual": solution.residual, "seconds": seconds, "steps": len(solution.history)}
