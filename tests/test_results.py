# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The table of results in README.md has the numbers of the committed JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

import pytest


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "studies" / "results"
README = (ROOT / "README.md").read_text()


def rows(name: str) -> list[list[str]]:
    """The cells of a table of README.md, without its headers."""
    lines = re.search(rf"<!-- {name}: .*?-->\n(.*?)\n<!-- {name}: end -->", README, re.DOTALL)[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def accuracy(part: str, method: str) -> float:
    """The best setting's mean over the seeds, %."""
    return max(mean(scores) for scores in load("initialization.json")["results"][part][method].values())


def error(family: str, target: str, method: str, key: str = "error") -> float:
    rows = load("pde/transfer.json")["rows"]
    (row,) = (row for row in rows if (row["family"], row["target"], row["method"]) == (family, target, method))
    return 100 * row[key]


PARTS = {
    "digits rotated and noisy": "digits, rotated and noisy (quickstart)",
    "the same on pykan": "pykan: rotated and noisy",
    "digits to MNIST": "digits to MNIST",
}


@pytest.mark.parametrize(("row", "part"), list(zip(rows("results"), PARTS.items(), strict=True)))
def test_accuracies(row: list[str], part: tuple[str, str]) -> None:
    assert row[0].startswith(part[0])
    full, lotra = (accuracy(part[1], method) for method in ("full fine-tuning", "gradient (16, 16, 6)"))
    check(row[1], full)
    check(row[2], lotra, lotra < full)


CASES = [("Allen-Cahn, moderate", "allen_cahn", "middle"), ("Burgers, large", "burgers", "far")]


@pytest.mark.parametrize(("row", "case"), list(zip(rows("pdes"), CASES, strict=True)))
def test_errors_of_pdes(row: list[str], case: tuple[str, str, str]) -> None:
    name, *case = case
    assert row[0] == name
    adam, lm, lotra = (error(*case, method) for method in ("full_adam", "full_lm", "lotra_lm"))
    early = error(*case, "lotra_lm", "error_at_a_fifth_of_the_seconds")
    for cell, value, loses in zip(
        row[1:], (adam, early, lm, lotra), (False, early > adam, False, lotra > lm), strict=True
    ):
        check(cell, value, loses)


def check(cell: str, value: float, loses: bool = False) -> None:
    """The cell has the value, in its digits, and a mark if LoTRA loses."""
    text = cell.removesuffix(" ▲")
    assert float(text) == pytest.approx(round(value, len(text.partition(".")[2])), rel=1e-9)
    assert cell.endswith("▲") == loses
