# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables of the benchmark, from its results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from study_tools.tables import table


Row = dict[str, Any]  # {"rates": {rate: {seed: [validation, test]}}, "seconds": {seed: seconds}, "bytes": bytes}
Results = dict[str, dict[str, Row]]  # of cases, of methods
FULL = "full, best by test"
ON_PATH = "full on the path"


def test_scores(row: Row, by: str = "validation") -> np.ndarray:
    """Return the test scores (seeds,) at the learning rate with the best mean by validation or test data."""
    column = ("validation", "test").index(by)
    values = [np.array([seeds[seed] for seed in sorted(seeds, key=int)]) for seeds in row["rates"].values()]
    means = [np.nan_to_num(value[:, column].mean(), nan=-np.inf) for value in values]
    return values[int(np.argmax(means))][:, 1]


def scores_of(rows: dict[str, Row], method: str) -> np.ndarray:
    """Return the test scores (seeds,) of a method; `FULL` is full fine-tuning at its best rate by test data."""
    return test_scores(rows["full"], "test") if method == FULL else test_scores(rows[method])


def standard_error(scores: np.ndarray) -> float:
    return scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def compare(scores: np.ndarray, rival: np.ndarray) -> int:
    """Return 1 if scores are ahead of the rival's by more than one standard error of the difference, -1 if behind."""
    seeds = min(len(scores), len(rival))
    difference = scores[:seeds] - rival[:seeds]
    error = standard_error(difference)
    return int(difference.mean() > error) - int(difference.mean() < -error)


def show(rows: dict[str, Row], method: str) -> str:
    """Return the mean of a method, marked if it is ahead of full fine-tuning, or behind it."""
    scores = scores_of(rows, method)
    mark = ("▼", "", "▲")[compare(scores, scores_of(rows, FULL)) + 1]
    return f"{scores.mean():.1f} {mark}".rstrip()


def tally(cases: Iterable[dict[str, Row]], method: str, rival: str) -> str:
    """Return in how many cases a method is ahead of a rival, level, and behind."""
    signs = [compare(scores_of(rows, method), scores_of(rows, rival)) for rows in cases]
    return " / ".join(str(signs.count(sign)) for sign in (1, 0, -1))


def mean_bytes(cases: Iterable[dict[str, Row]], method: str) -> str:
    return f"{np.mean([rows[method]['bytes'] for rows in cases]):,.0f}"


def mean_seconds(cases: Iterable[dict[str, Row]], method: str) -> str:
    return f"{np.mean([np.mean([*rows[method]['seconds'].values()]) for rows in cases]):.1f}"


def as_text(results: Results, methods: list[str]) -> str:
    """Return the table of all cases and methods in Markdown."""
    cases = [rows for rows in results.values() if all(method in rows for method in ("full", ON_PATH, *methods))]
    lines = []
    for title, rows in results.items():
        cells = [title]
        for method in (FULL, *methods):
            if method not in (FULL, *rows):
                cells.append("")
                continue
            mean, *mark = show(rows, method).split()
            error = standard_error(scores_of(rows, method))
            cells.append(" ".join([f"{mean} ± {error:.1f}", *mark]))
        lines.append(cells)
    for rival in (FULL, ON_PATH):
        tallies = [tally(cases, method, rival) for method in methods]
        lines.append([f"**ahead / level / behind: {rival}**", "", *tallies])
    lines.append(["**bytes, mean**", "", *(mean_bytes(cases, method) for method in methods)])
    lines.append(["**CPU seconds, mean**", "", *(mean_seconds(cases, method) for method in methods)])
    return table(f"| case | {FULL} | {' | '.join(methods)} |", lines)
