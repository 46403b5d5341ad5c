# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables of README.md and of the pages are those of the results: docs/tables.py."""

from pathlib import Path

from helpers import load_script


tables = load_script(Path(__file__).parents[1] / "docs" / "tables.py")
OLD = "a <!-- figure: two -->1<!-- end of figure -->\n<!-- table: one -->\n| 1 |\n<!-- end of table -->\n"


def test_the_tables_are_current():
    stale = [name for path, text in tables.changed().items() for name in tables.stale(path, text)]

    assert stale == tables.unused() == []


def test_an_old_table_is_named_and_rendered(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(OLD)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| 2 |"})
    monkeypatch.setattr(tables, "FIGURES", {"two": lambda: "1", "three": lambda: "3"})
    monkeypatch.setattr(tables, "PAGES", {})

    ((path, text),) = tables.changed().items()

    assert text == OLD.replace("| 1 |", "| 2 |")
    assert tables.stale(path, text) == ["README.md: one"]
    assert tables.unused() == ["three"]
