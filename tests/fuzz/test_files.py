# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Damaged and hostile files through seven doors; the long runs are in `examples/studies/results/`."""

from __future__ import annotations

import doors
import grammar
import mutations
import pytest


@pytest.mark.parametrize(
    "generate, count",
    [(mutations.generate, 200), (grammar.generate, 200), (grammar.generate_pattern, 50)],
    ids=["damaged", "hostile", "patterns"],
)
def test_refused_clearly_or_what_the_files_say(generate, count):
    report = doors.run(count, generate, limit=30.0)
    assert report["wrong"] == []
    assert report["refused by loading"] > count / 4
    assert report["growth of the peak memory, MiB"] < 1024
