# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Checks of arguments: numbers and functions."""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Iterable
from typing import Any


def as_number(value: Any) -> float:
    """Return a finite number, or a tensor with one, as a float; NaN otherwise, so that every comparison is false."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # None, a list, 10**400, several numbers in a tensor
        return math.nan
    return number if math.isfinite(number) else math.nan


def check_number(value: Any, argument: str, interval: str) -> float:
    """Return a value as a float; raise a `ValueError` unless it is finite and in an interval such as "[0, 1)"."""
    number = as_number(value)
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"`{argument}` is {value!r:.100}, but must be a number in {interval}.")
    return number


def check_count(value: Any, argument: str, low: int = 1) -> int:
    """Return a value as an int; raise a `ValueError` unless it is an integer of at least `low`, also of numpy."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor on the meta device
        count = None
    if count is None or count < low:
        raise ValueError(f"`{argument}` is {value!r:.100}, but must be an integer of at least {low}.")
    return count


def check_function(value: Any, argument: str, count: int | None = None) -> None:
    """Raise a `TypeError` unless a value can be called, with this number of positional arguments."""
    if not callable(value):
        raise TypeError(f"`{argument}` is {value!r:.100}, but must be a function.")
    if count is None:
        return
    try:
        # a decorator may add arguments to those of the function inside
        signature = inspect.signature(value, follow_wrapped=False)
        signature.bind(*range(count))
    except ValueError:  # compiled functions have no signature
        pass
    except TypeError as error:
        raise TypeError(f"`{argument}` is called with {count} positional arguments: {error}.") from error


def check_list(value: Any, argument: str, expected: str, count: int | None = None) -> list[Any]:
    """Return a value as a list; raise a `ValueError` unless it has entries, as many as `count`."""
    try:
        entries = list(value)
    except TypeError:
        entries = None
    if entries is None or count not in (None, len(entries)):
        raise ValueError(f"`{argument}` is {value!r:.100}, but must be {expected}.")
    return entries


def list_first(words: Iterable[str]) -> str:
    """Return the first three of some words, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more


def natural_order(name: str) -> str:
    """Return a key that sorts `layers.2` before `layers.10`."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)
