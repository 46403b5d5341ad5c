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
    """Escape control characters, line breaks and marks of direction, such as \\x1b.

    A terminal obeys control characters, so text of files is escaped before it is printed.
    """
    escaped = ""
    for char in text:
        if not char.isprintable():
            char = char.encode("unicode_escape").decode()
        escaped += char
    return escaped


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
        """Return the report for JSON: numbers, strings, lists and dicts by name, None for NaN and infinity."""
        return _as_plain(self)

    def __str__(self) -> str:
        columns, rows, notes = self._table()
        titles = [column.removeprefix(">") for column in columns]
        cells = [titles, *rows] if rows and any(titles) else rows
        padded = []
        for title, *column in zip(columns, *cells, strict=True):
            texts = list(map(printable, column))
            width = max(map(len, texts), default=0)
            align = str.rjust if title.startswith(">") else str.ljust
            padded.append([align(text, width) for text in texts])
        lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
        lines += map(printable, notes)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from html import escape  # notebooks only: its table of entities takes a millisecond

        return f"<pre>{escape(str(self))}</pre>"


def _as_plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):  # JSON has neither NaN nor infinity
        return None
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    as_dict = getattr(value, "_asdict", None)
    if as_dict is not None:  # a NamedTuple
        value = as_dict()
    if isinstance(value, dict):
        entries = {}
        for key, entry in value.items():
            name = key if isinstance(key, str) else ".".join(key)
            entries[name] = _as_plain(entry)
        return entries
    if isinstance(value, (list, tuple)):
        return [_as_plain(entry) for entry in value]
    return value
