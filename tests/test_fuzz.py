# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Short runs of the mutated files and the random sequences. The results of the long runs are in
`examples/results/fuzz_*.json`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import run
from sequences import run_sequence


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hundred_damaged_files(seed):
    report = run(100, seed)
    assert report["wrong"] == []
    assert report["refused"] > 50 and report["refused"] + report["equal output"] == 100
    assert report["growth of the peak memory, MiB"] < 1024


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32 - 1))
def test_sequences_equal_the_dense_model(seed):
    assert len(run_sequence(seed)) == 12
