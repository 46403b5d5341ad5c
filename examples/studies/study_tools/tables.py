# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables of the studies and of the pages, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: str, rows: Iterable[Iterable[object]], left: int = 1) -> str:
    """Return a table; the first `left` columns are aligned to the left, the others to the right."""
    rule = "|" + "---|" * left + "--:|" * (header.count("|") - 1 - left)
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([header, rule, *lines]) + "\n"


def short(value: float) -> str:
    """Return two digits, as 5.6e-8."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")
