# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Read and format the results that `run.py` writes."""

from __future__ import annotations


LOSES = "▲"
LINEAR = "nn.Linear(8n, n)"
OTHER_KANS = ("inkan", "flashkan", "FastKAN-like", "efficient-kan", "pykan")


def median(row: dict, subject: str, part: str = "total") -> float | None:
    """A median in milliseconds; None if the subject was not measured."""
    return row["ms"].get(subject, {}).get(part, [None] * 3)[1]


def number(value: float | None) -> str:
    """The number with three digits and without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(first: float | None, second: float | None, loses_above: float | None = None) -> str:
    """The ratio first / second, marked if it is above `loses_above`."""
    if first is None or second is None:
        return "-"
    mark = f" {LOSES}" if loses_above is not None and first / second > loses_above else ""
    return f"{first / second:.2f}{mark}"


def size(row: dict) -> str:
    """The size of a training step's cell."""
    widths = row["widths"]
    name = f"{widths[0]} -> {widths[1]}" if len(widths) == 2 else str(widths)
    return f"{name}, batch {row['batch']}" + (", 2nd derivatives" if "Laplacian" in row["loss"] else "")


def find(results: dict, figure: str, **settings: object) -> dict | None:
    """The first row of a figure with these settings."""
    rows = results.get(figure, {"rows": []})["rows"]
    return next((row for row in rows if all(row.get(key) == value for key, value in settings.items())), None)
