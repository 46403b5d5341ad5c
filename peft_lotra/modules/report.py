# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Reports that print as text tables, show in notebooks, and turn into plain values for JSON."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch


class TextTable(NamedTuple):
    """The text of a report."""

    columns: list[str]  # the titles, with ">" in front to align the column to the right; no header if all are empty
    rows: list[list[str]]
    notes: list[str] = []  # lines below the table


def printable(text: str) -> str:
    """The text with escapes such as \\x1b for control characters, line breaks and marks of direction.

    Text of files goes through here before it is printed: a terminal obeys control characters.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Report(ABC):
    """The base of all reports.

    Example:
        >>> class Sizes(Report):
        ...     def _table(self):
        ...         rows = [["layers.0", "8"], ["layers.1", "12"]]
        ...         return TextTable(["layer", ">size"], rows, ["20 in all"])
        >>> print(Sizes())
        layer     size
        layers.0     8
        layers.1    12
        20 in all
    """

    @abstractmethod
    def _table(self) -> TextTable: ...

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON: numbers, strings, lists and dicts by name, None for NaN and infinity."""
        return _plain(self)

    def __str__(self) -> str:
        columns, rows, notes = self._table()
        titles = [column.removeprefix(">") for column in columns]
        lines = [titles, *rows] if rows and any(titles) else rows
        lines = [list(map(printable, line)) for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = [str.rjust if column.startswith(">") else str.ljust for column in columns]
        padded = [[put(cell, n) for put, cell, n in zip(align, line, widths, strict=True)] for line in lines]
        return "\n".join([*("  ".join(line).rstrip() for line in padded), *map(printable, notes)])

    def _repr_html_(self) -> str:
        from html import escape  # notebooks only: its table of entities takes a millisecond

        return f"<pre>{escape(str(self))}</pre>"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):  # JSON has neither NaN nor infinity
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, tuple) and (as_dict := getattr(value, "_asdict", None)):  # a NamedTuple
        return _plain(as_dict())
    if isinstance(value, dict):
        return {key if isinstance(key, str) else ".".join(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
