# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The base of the reports; what each report says is tested beside the function that makes it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from html.parser import HTMLParser

import torch
from rich.console import Console

from peft_lotra.report import Report, TextTable, printable


@dataclass(frozen=True)
class Sizes(Report):
    sizes: dict[str, int]
    note: str = "as [bold] as <b>&"
    titles: tuple[str, ...] = ("layer", ">size")

    def _table(self):
        return TextTable(list(self.titles), [[name, str(size)] for name, size in self.sizes.items()], [self.note])


SIZES = {"layers.0": 8, "a [red] <i>&": 1200}


class Cells(HTMLParser):
    """The text of the cells of a table, by tag."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.open = {"th": [], "td": [], "p": []}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells[self.open[-1]].append(data)


def in_rich(report, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(report)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_text_is_aligned():
    expected = ["layer         size", "layers.0         8", "a [red] <i>&  1200", "as [bold] as <b>&"]
    assert str(Sizes(SIZES)).splitlines() == expected
    assert in_rich(Sizes(SIZES)) == expected


def test_without_titles_there_is_no_header():
    report = Sizes(SIZES, titles=("", ">"))
    expected = ["layers.0         8", "a [red] <i>&  1200", "as [bold] as <b>&"]
    assert str(report).splitlines() == in_rich(report) == expected
    assert Cells(report._repr_html_()).cells["th"] == []


def test_without_rows_there_are_only_the_notes():
    assert str(Sizes({})) == "as [bold] as <b>&"
    assert in_rich(Sizes({})) == ["as [bold] as <b>&"]
    assert Cells(Sizes({})._repr_html_()).cells == {"th": [], "td": [], "p": ["as [bold] as <b>&"]}


def test_a_narrow_console_breaks_cells_but_not_notes_to_the_width_of_the_table():
    lines = in_rich(Sizes(SIZES, "a note that is longer than the table"), width=40)
    assert lines[-1] == "a note that is longer than the table"
    lines = in_rich(Sizes({"layers.0.conv.kan": 1}, "end"), width=14)
    assert "".join(line.split()[0] for line in lines[1:-1]) == "layers.0.conv.kan"  # nothing is cut off


def test_html_shows_the_same_cells():
    cells = Cells(Sizes(SIZES)._repr_html_()).cells
    assert cells["th"] == ["layer", "size"] and cells["p"] == ["as [bold] as <b>&"]
    assert cells["td"] == ["layers.0", "8", "a [red] <i>&", "1200"]
    assert '<td style="text-align: right">8</td>' in Sizes(SIZES)._repr_html_()


def test_as_dict_is_json():
    @dataclass(frozen=True)
    class Errors(Report):
        errors: dict[tuple[str, str], float]
        values: torch.Tensor
        layers: dict[str, Sizes]
        names: set[str]

        def _table(self):
            return TextTable([], [])

    report = Errors({("kan", "default"): 0.5}, torch.eye(2), {"x": Sizes({"y": 3})}, {"z"})
    assert json.loads(json.dumps(report.as_dict())) == {
        "errors": {"kan.default": 0.5},
        "values": [[1.0, 0.0], [0.0, 1.0]],
        "layers": {"x": {"sizes": {"y": 3}, "note": "as [bold] as <b>&", "titles": ["layer", ">size"]}},
        "names": ["z"],
    }
    assert str(report) == ""


def test_a_terminal_obeys_nothing_of_a_text():
    text = "é\x1b[2J\x9b31m\r\n\t\u202e\u2066\udcff"
    assert printable(text) == r"é\x1b[2J\x9b31m\r\n\t\u202e\u2066\udcff" and printable("é (2, 2) %") == "é (2, 2) %"

    class Names(Report):
        def _table(self):
            return TextTable(["name"], [[text]], [text])

    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(Names())
    for shown in (str(Names()), console.file.getvalue(), Names()._repr_html_()):
        assert shown.count(r"\x1b[2J\x9b31m\r\n\t\u202e") == 2 and "\x1b[2J" not in shown
