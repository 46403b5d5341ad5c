# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Patterns of layer names: which are names, and what they match."""

from __future__ import annotations

import re

import pytest
from peft.utils.other import get_pattern_key

from peft_lotra.files.patterns import check_lengths, exact_pattern, find_key, is_literal, pattern_key


NAMES = ["layers.0", "tail.layers.0", "a-b.c d", "h+1.x|y", r"back\slash", "^a", "é.ü", "line\nbreak"]


@pytest.mark.parametrize("name", NAMES)
def test_what_saving_writes_is_literal(name):
    assert is_literal(re.escape(name)) and is_literal(pattern_key(name)) and is_literal(exact_pattern(NAMES))
    key = pattern_key(name)
    assert find_key({"other": 1, key: 2}, name) == key and find_key({key: 2}, f"in.{name}") is None
    assert find_key({re.escape(name): 1}, f"in.{name}") and not find_key({re.escape(name): 1}, f"in{name}")
    assert [n for n in NAMES if find_key({exact_pattern(NAMES[:2]): 1}, n)] == NAMES[:2]


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "|",
        "a|",
        "|a",
        "a||b",
        "^",
        "a^b",
        "^^a",
        "a$",
        "a*",
        ".+",
        "a?",
        "(a)",
        "[a]",
        "a{1}",
        r"\d",
        "a\\",
        "(?i)a",
    ],
)
def test_regexes_are_none(pattern):
    assert not is_literal(pattern)


@pytest.mark.parametrize("keys", [["a.0", r".*\.0"], [r".*\.0", "a.0"], ["0|b.1", "^a.0"], ["^0", "x"], [r"\w"]])
@pytest.mark.parametrize("name", ["a.0", "b.a.0", "b.1", "0", "x", "b.x"])
def test_keys_match_as_in_peft(keys, name):
    key = get_pattern_key(keys, name)
    assert find_key(dict.fromkeys(keys), name) == (key if key in keys else None)


def test_a_dot_is_a_dot():
    assert find_key({"layers.0": 1}, "layersx0") is None


def test_long_ones():
    check_lengths(["a" * 100_000], ["a" * 1000] * 20_000)
    for patterns, names in ((["a"] * 100_001, []), ([], ["a" * 1001]), ([], ["a"] * 20_001)):
        with pytest.raises(ValueError, match="more than"):
            check_lengths(patterns, names)
