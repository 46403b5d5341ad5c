# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Each claim of SECURITY.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def claims() -> dict[str, str]:
    """The claims of the two sections of promises, by their first words."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
    promised = [text for title, text in sections.items() if "cannot do" in title or "guards" in title]
    assert len(promised) == 2
    return dict(
        claim for text in promised for claim in re.findall(r"^\* \*\*(.+?)\*\*(.*?)(?=^\* |\Z)", text, re.S | re.M)
    )


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_there_are_claims() -> None:
    assert len(claims()) > 10


@pytest.mark.parametrize("claim", claims())
def test_each_claim_names_a_test(claim: str) -> None:
    assert TEST.search(claims()[claim])


@pytest.mark.parametrize(("file", "function"), sorted(set(TEST.findall(PAGE))))
def test_the_test_exists(file: str, function: str) -> None:
    assert function.startswith("test_") and function in functions(ROOT / file)


def test_no_test_is_named_in_another_form() -> None:
    assert set(re.findall(r"tests/[\w/]+\.py", TEST.sub("", PAGE))) <= {
        "tests/trust/test_security_page.py",
        "tests/support/grammar.py",
        "tests/support/mutations.py",
        "tests/support/sequences.py",
    }
