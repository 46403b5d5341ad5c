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
TABLE = re.search(r"<!-- results: .*?-->\n(.*?)\n<!-- results: end -->", (ROOT / "README.md").read_text(), re.DOTALL)[
    1
]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()[2:]]


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def accuracy(part: str, method: str) -> float:
    """The best setting's mean over the seeds, %."""
    return max(mean(scores) for scores in load("initialization.json")["results"][part][method].values())


def error(family: str, target: str, method: str, key: str = "error") -> float:
    rows = load("pde/transfer.json")["rows"]
    (row,) = (row for row in rows if (row["family"], row["target"], row["method"]) == (family, target, method))
    return 100 * row[key]


def milliseconds(width: int, batch: int, method: str) -> float:
    rows = load("benchmarks/cpu.json")["training_step"]["rows"]
    found = [r for r in rows if (r["kan"], r["widths"], r["batch"]) == ("own KAN", [width, width], batch)]
    return found[0]["ms"][method]["total"][1]


def expected() -> list[tuple[str, float, float]]:
    """The start of each line, full fine-tuning and LoTRA."""
    parts = ("digits, rotated and noisy (quickstart)", "efficient-kan: rotated and noisy", "pykan: rotated and noisy")
    names = ("digits rotated and noisy", "the same on efficient-kan", "the same on pykan", "digits to MNIST")
    rows = [
        (name, accuracy(part, "full fine-tuning"), accuracy(part, "gradient (16, 16, 6)"))
        for name, part in zip(names, (*parts, "digits to MNIST"), strict=True)
    ]
    fifth = "error_at_a_fifth_of_the_seconds"
    for name, family, target in (("Allen-Cahn, middle", "allen_cahn", "middle"), ("Burgers, far", "burgers", "far")):
        rows.append((name, error(family, target, "full_adam"), error(family, target, "lotra_lm", fifth)))
    case = ("allen_cahn", "middle")
    rows.append(("Allen-Cahn, middle: error %, both", error(*case, "full_lm"), error(*case, "lotra_lm")))
    for width, batch in ((16, 256), (1024, 1024)):
        values = (milliseconds(width, batch, method) for method in ("full fine-tuning", "LoTRA"))
        rows.append((f"a training step, {width} -> {width}, batch {batch}", *values))
    return rows


@pytest.mark.parametrize(("row", "truth"), list(zip(ROWS, expected(), strict=True)), ids=lambda x: str(x[0])[:30])
def test_a_line_has_the_numbers_of_the_results(row: list[str], truth: tuple[str, float, float]) -> None:
    name, full, lotra = truth
    assert row[0].startswith(name)
    for cell, value in zip(row[1:3], (full, lotra), strict=True):
        text = cell.removesuffix(" ▲")
        digits = len(text.partition(".")[2])
        assert float(text) == pytest.approx(round(value, digits), rel=1e-9)
    more_is_better = "accuracy" in row[0] or "the same on" in row[0]
    loses = lotra < full if more_is_better else lotra > full
    assert row[2].endswith("▲") == loses
