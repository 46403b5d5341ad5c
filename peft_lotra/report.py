# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What functions of this package report: tables that print, show in notebooks, and turn into plain values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch


if TYPE_CHECKING:
    from rich.table import Table


class TextTable(NamedTuple):
    """
    The text of a report.

    Attributes:
        columns: the titles; one that starts with ">" is of a column of numbers, which are aligned to the right.
        rows: the cells of each row, as many as columns.
        notes: lines below the table.
    """

    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = []


class Report(ABC):
    """The base of all reports: subclasses say in `_table` what is shown.

    Reports print as text, rich shows them as tables, notebooks as HTML, and `as_dict` gives plain values for JSON.
    """

    @abstractmethod
    def _table(self) -> TextTable: ...

    def as_dict(self) -> dict[str, Any]:
        """The report in plain values (numbers, strings, lists and dicts by name), for JSON."""
        return _plain(self)

    def __rich__(self) -> Table:
        from rich.table import Column, Table

        columns, rows, notes = self._table()
        table = Table(
            *(
                Column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left", overflow="fold")
                for title in columns
            ),
            box=None,
            padding=(0, 2, 0, 0),
            caption="\n".join(notes) or None,
            caption_justify="left",
            caption_style="",
        )
        for row in rows:
            table.add_row(*map(_unmarked, row))
        return table

    def __str__(self) -> str:
        columns, rows, notes = self._table()
        lines = [[title.removeprefix(">") for title in columns], *rows] if rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(_aligned(*cell) for cell in zip(line, widths, columns, strict=True)) for line in lines]
        return "\n".join([*(line.rstrip() for line in text), *notes])

    def _repr_html_(self) -> str:
        columns, rows, notes = self._table()

        def line(cells: list[str], tag: str) -> str:
            aligned = ("right" if title.startswith(">") else "left" for title in columns)
            return "".join(
                f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
                for cell, side in zip(cells, aligned, strict=True)
            )

        head = line([title.removeprefix(">") for title in columns], "th")
        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
        return table + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _aligned(text: str, width: int, title: str) -> str:
    return text.rjust(width) if title.startswith(">") else text.ljust(width)


def _unmarked(text: str) -> str:
    """Square brackets are markup to rich, but names of layers are not."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else ".".join(map(str, key)): _plain(entry) for key, entry in value.items()
        }
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    return value
