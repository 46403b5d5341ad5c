# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Patterns of layer names; those from a file are names only, so that none of them can take long to match."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache


MAX_PATTERNS_LENGTH = 100_000  # of all patterns of a file together
MAX_NAMES, MAX_NAME_LENGTH = 20_000, 1_000  # of layers in a file


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a name, escaped or not, with or without `^` in front, or alternatives of such names."""
    plain = re.sub(r"\\\W", "x", pattern)
    names = [name.removeprefix("^") for name in plain.split("|")]
    return all(name and not re.search(r"[\\^$*+?{}\[\]()]", name) for name in names)


def refuse_pattern(field: str, pattern: str) -> None:
    """Raises the ValueError for a pattern of a file that is no literal; matching one can take exponential time."""
    raise ValueError(
        f"The config of the adapter has the pattern {pattern[:100]!r} in `{field}`, which may take forever to match. "
        "A pattern from a file must be the name of a layer or its end, escaped or not, with `^` in front or `|` "
        "between names (in `modules_to_save` and `layers_pattern`, a plain name). Write names in its place and remove "
        "the entry `integrity`, or load the adapter with the version that saved it and save it with this one."
    )


def check_lengths(patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuses a file with more patterns, or more or longer names of layers, than can be compared in no time."""
    if sum(map(len, patterns)) > MAX_PATTERNS_LENGTH:
        raise ValueError(
            f"The patterns of the adapter have more than {MAX_PATTERNS_LENGTH:,} characters together, which may take "
            "forever to match. Use fewer, or shorter ones: the end of a name matches too."
        )
    if len(names) > MAX_NAMES or any(len(name) > MAX_NAME_LENGTH for name in names):
        raise ValueError(
            f"The adapter names more than {MAX_NAMES:,} layers, or one by more than {MAX_NAME_LENGTH:,} characters."
        )


def pattern_key(name: str) -> str:
    """A key for `rank_pattern` that matches this layer alone; PEFT reads keys as regexes of the end of a name."""
    return "^" + re.escape(name)


def exact_pattern(names: Iterable[str]) -> str:
    """A regex for `target_modules` that matches these names alone."""
    return "|".join(map(re.escape, sorted(names)))


def find_key(patterns: Mapping[str, object], name: str) -> str | None:
    """The first key that matches a name, or its end behind a dot, as in PEFT; literal keys are compared with it."""
    keys = tuple(patterns)
    literals, regexes = _literals_and_regexes(keys)
    ends = [(True, name), (False, name), *((False, name[i + 1 :]) for i, letter in enumerate(name) if letter == ".")]
    found = [literals[end] for end in ends if end in literals] if literals else []
    found += [index for index, regex in regexes if regex.match(name)]
    return keys[min(found)] if found else None


@lru_cache(maxsize=8)
def _literals_and_regexes(
    keys: tuple[str, ...],
) -> tuple[dict[tuple[bool, str], int], list[tuple[int, re.Pattern[str]]]]:
    """The first place of each literal, by whether it is a whole name; and what is none, with its place."""
    literals, regexes = {}, []
    for index, key in enumerate(keys):
        if not is_literal(key):
            regexes.append((index, re.compile(rf"(.*\.)?({key})$")))
            continue
        for part in re.findall(r"(?:\\.|[^|\\])+", key, re.DOTALL):
            name = re.sub(r"\\(.)", r"\1", part.removeprefix("^"), flags=re.DOTALL)
            literals.setdefault((part.startswith("^"), name), index)
    return literals, regexes
