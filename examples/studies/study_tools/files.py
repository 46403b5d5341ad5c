# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The results of a study: JSON, and a page of Markdown beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path, fresh: bool = False, must: bool = False) -> Any:
    """What the file has; an empty dict for a fresh start, or if there is none and there need not be one."""
    return json.loads(path.read_text()) if must or (path.exists() and not fresh) else {}


def write(path: Path, results: Any, text: str | None = None) -> None:
    """Writes the file as a whole: a killed process leaves the old one or the new one. Shows the text, too."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
    if text is not None:
        path.with_suffix(".md").write_text(text)
        print(text)
