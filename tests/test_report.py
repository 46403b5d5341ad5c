# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The base of the reports. The reports themselves are tested beside what makes them."""

import html
import json
from dataclasses import dataclass

import torch

from peft_lotra.modules.report import Report, TextTable, printable


@dataclass(frozen=True)
class Sizes(Report):
    sizes: dict[str, int]
    titles: tuple[str, ...] = ("layer", ">size")

    def _table(self):
        rows = [[name, str(size)] for name, size in self.sizes.items()]
        return TextTable(list(self.titles), rows, ["as [bold] as <b>&"])


SIZES = {"layers.0": 8, "a [red] <i>&": 1200}


def assert_shows(report, lines):
    """The same text in `print` and in a notebook."""
    assert str(report).splitlines() == lines
    assert html.unescape(report._repr_html_()) == f"<pre>{report}</pre>"


def test_text_is_aligned():
    lines = ["layer         size", "layers.0         8", "a [red] <i>&  1200", "as [bold] as <b>&"]

    assert_shows(Sizes(SIZES), lines)
    assert "&lt;i&gt;&amp;" in Sizes(SIZES)._repr_html_()
    assert_shows(Sizes(SIZES, titles=("", ">")), lines[1:])  # no header
    assert_shows(Sizes({}), lines[-1:])


def test_as_dict_is_json():
    @dataclass(frozen=True)
    class Errors(Report):
        errors: dict[tuple[str, str], float]
        values: torch.Tensor
        layers: dict[str, Sizes]

        def _table(self):
            return TextTable([], [])

    report = Errors({("kan", "default"): 0.5}, torch.eye(2), {"x": Sizes({"y": 3})})
    assert json.loads(json.dumps(report.as_dict())) == {
        "errors": {"kan.default": 0.5},
        "values": [[1.0, 0.0], [0.0, 1.0]],
        "layers": {"x": {"sizes": {"y": 3}, "titles": ["layer", ">size"]}},
    }
    assert str(report) == ""


def test_control_characters_are_escaped():
    text, escaped = "é\x1b[2J\x9b31m\r\n\t\u202e\u2066\udcff", r"é\x1b[2J\x9b31m\r\n\t\u202e\u2066\udcff"
    assert printable(text) == escaped
    assert printable("é (2, 2) %") == "é (2, 2) %"

    class Names(Report):
        def _table(self):
            return TextTable(["name"], [[text]], [text])

    assert_shows(Names(), ["name", escaped, escaped])
