# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The results of a study: JSON with the machine and the commit, and a page of Markdown beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from study_tools import machine


def path_of(args: argparse.Namespace, name: str) -> Path:
    """Return the JSON file of a study in the folder `args.output`."""
    return args.output / f"{name}{'_quick' if args.quick else ''}.json"


def read(path: Path, fresh: bool = False, must: bool = False) -> Any:
    """What the file has; an empty dict for a fresh start, or if there is none and there need not be one."""
    return json.loads(path.read_text()) if must or (path.exists() and not fresh) else {}


def write(path: Path, results: dict, indent: int | None = 1) -> None:
    """Write the results with the machine, unless they name it, and the commit, of the last run that was added."""
    replace(path, {"machine": machine.describe(), **results, "commit": machine.commit()}, indent)


def replace(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write the file as a whole: a killed process leaves the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent) + "\n")
    part.replace(path)


def write_page(path: Path, text: str) -> None:
    """Write the page beside the file, and show it."""
    path.with_suffix(".md").write_text(text)
    print(text)
