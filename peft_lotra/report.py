# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What functions of this package report: tables that print, show in notebooks, and turn into plain values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch


if TYPE_CHECKING:
    from rich.console import Group


class TextTable(NamedTuple):
    """The text of a report."""

    columns: list[str]  # the titles, with ">" in front to align the column to the right; no header if all are empty
    rows: list[list[str]]
    notes: list[str] = []  # lines below the table

    @property
    def titles(self) -> list[str]:
        """The titles without the marks of alignment; empty without a header."""
        titles = [column.removeprefix(">") for column in self.columns]
        return titles if any(titles) else []

    @property
    def sides(self) -> list[Literal["left", "right"]]:
        """The side to which each column is aligned."""
        return ["right" if column.startswith(">") else "left" for column in self.columns]


def printable(text: str) -> str:
    """The text with escapes such as \\x1b for control characters, line breaks and marks of direction.

    Text of files goes through here before it is printed: a terminal obeys control characters.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Report(ABC):
    """The base of all reports, which print as text, in rich as tables, and in notebooks as HTML.

    Example:
        >>> class Sizes(Report):
        ...     def _table(self):
        ...         return TextTable(["layer", ">size"], [["layers.0", "8"], ["layers.1", "12"]], ["20 in all"])
        >>> print(Sizes())
        layer     size
        layers.0     8
        layers.1    12
        20 in all
    """

    @abstractmethod
    def _table(self) -> TextTable: ...

    def _printable_table(self) -> TextTable:
        columns, rows, notes = self._table()
        return TextTable(columns, [list(map(printable, row)) for row in rows], list(map(printable, notes)))

    def as_dict(self) -> dict[str, Any]:
        """The report in plain values (numbers, strings, lists and dicts by name), for JSON."""
        return _plain(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        content = self._printable_table()
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(content.titles))
        for title, side in zip(content.titles or content.columns, content.sides, strict=True):
            table.add_column(title, justify=side, overflow="fold")
        for row in content.rows:
            table.add_row(*map(Text, row))  # the brackets in names of layers are no markup
        return Group(*[table] * bool(content.rows), *map(Text, content.notes))

    def __str__(self) -> str:
        content = self._printable_table()
        lines = [content.titles] * bool(content.titles) + content.rows if content.rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        align = [str.rjust if side == "right" else str.ljust for side in content.sides]
        padded = [[put(cell, n) for put, cell, n in zip(align, line, widths, strict=True)] for line in lines]
        return "\n".join([*("  ".join(line).rstrip() for line in padded), *content.notes])

    def _repr_html_(self) -> str:
        from html import escape  # notebooks only: its table of entities takes a millisecond

        content = self._printable_table()

        def line(cells: list[str], tag: str) -> str:
            pairs = zip(cells, content.sides, strict=True)
            styled = (f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in pairs)
            return f"<tr>{''.join(styled)}</tr>"

        head = f"<thead>{line(content.titles, 'th')}</thead>" if content.titles else ""
        body = "".join(line(row, "td") for row in content.rows)
        table = f"<table>{head}<tbody>{body}</tbody></table>" if content.rows else ""
        return table + (f"<p>{'<br>'.join(map(escape, content.notes))}</p>" if content.notes else "")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, tuple) and (as_dict := getattr(value, "_asdict", None)):  # a NamedTuple
        return _plain(as_dict())
    if isinstance(value, dict):
        keys = [key if isinstance(key, str) else ".".join(map(str, key)) for key in value]
        return dict(zip(keys, map(_plain, value.values()), strict=True))
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    return value
