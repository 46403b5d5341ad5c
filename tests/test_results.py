# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables of README.md and docs/paper.md have the numbers of the committed JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import geometric_mean, mean

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


def test_the_page_of_the_paper() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = load("pde/transfer.json")["rows"]
    errors = {(row["family"], row["target"], row["method"]): row["error"] for row in rows}
    cases = {key[:2] for key in errors}

    def ratios(method: str, other: str) -> list[float]:
        return [errors[(*case, method)] / errors[(*case, other)] for case in cases]

    one_rate = ratios("lotra_uniform_adam", "lotra_adam")
    assert f"has {spread(one_rate)} times the error" in text
    assert f"{geometric_mean(one_rate):.1f} times in the geometric mean" in text
    assert f"{spread(ratios('lotra_adam', 'full_adam'))} times the error of full fine-tuning" in text
    assert f"from zero {spread(ratios('scratch_adam', 'full_adam'))} times" in text
    assert f"is {spread(ratios('lotra_lm', 'full_lm'))} times more accurate" in text


def test_the_expressiveness_on_the_page_of_the_paper() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    results = load("expressiveness.json")["results"]
    tasks = [task for task in results if "planted" not in task]

    def left(kind: str, key: str, rank: int, part: str = "") -> list[float]:
        found = [results[task][kind] for task in tasks if not part or task.startswith("PDE") == (part == "PDE")]
        return [mean(run[str(rank)][key] for run in runs) for runs in found]

    assert len(tasks) == 6
    update, random, smooth = (spread(left(kind, "tensor", 8), 2) for kind in ("update", "random", "smooth random"))
    assert f"leaves {update} of an update, {random} of a random one of its norm, {smooth} of a smooth" in text
    empty = [sum(bound >= 1 for bound in left("update", "bound", rank)) for rank in (2, 4)]
    assert f"on {empty[0]} of six tasks at rank 2 and on {empty[1]} at rank 4" in text
    bound = left("update", "bound", 8)
    ratios = [b / t for b, t in zip(bound, left("update", "tensor", 8), strict=True)]
    assert f"at rank 8 it is {spread(bound, 2)}, {spread(ratios)} times the measured error" in text
    data, pdes = (spread(left("update", "function", 8, part), 2) for part in ("data", "PDE"))
    assert f"leaves {data} on data, but {pdes} on the PDEs" in text


def spread(values: list[float], digits: int = 1) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def check(cell: str, value: float, loses: bool = False) -> None:
    """The cell has the value, in its digits, and a mark if LoTRA loses."""
    text = cell.removesuffix(" ▲")
    assert float(text) == pytest.approx(round(value, len(text.partition(".")[2])), rel=1e-9)
    assert cell.endswith("▲") == loses
