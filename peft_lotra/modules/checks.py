# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Arguments of users: numbers, paths and names."""

from __future__ import annotations

import math
import os
from typing import Any


def as_number(value: Any) -> float:
    """A finite number, or one in a tensor, as a float; NaN, of which no comparison is true, for anything else."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # None, a list, 10**400, several numbers in a tensor
        return math.nan
    return number if math.isfinite(number) else math.nan


def check_path(path: Any, argument: str) -> None:
    """Raises a `TypeError` unless a value can be that of a path, or of a repository on the Hub."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`{argument}` is {path!r:.100}, but must be a path: a string or a `pathlib.Path`.")


def check_name(name: Any, argument: str = "adapter_name") -> None:
    """Raises a `TypeError` unless a value is a string."""
    if not isinstance(name, str):
        raise TypeError(f"`{argument}` is {name!r:.100}, but must be a string.")
