# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A hundred random sequences of operations beside a dense model; the long runs are in `examples/studies/results/`."""

from __future__ import annotations

import pytest
from sequences import run


@pytest.mark.parametrize("seed", range(4))
def test_sequences_equal_the_dense_model(seed):
    run(25, seed)
