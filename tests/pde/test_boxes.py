# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch

from peft_lotra.pde.boxes import check_box


def test_ends():
    low, high = check_box((0, 1), torch.tensor([2.0, 3.0]))
    assert low.tolist() == [0.0, 1.0] and high.tolist() == [2.0, 3.0] and low.dtype == high.dtype == torch.float64


@pytest.mark.parametrize(
    "low, high", [((0,), (1, 1)), ((), ()), (0, 1), ((1,), (1,)), ((0,), (math.inf,)), ((2,), (1,))]
)
def test_no_box(low, high):
    with pytest.raises(ValueError, match="`low` is .* and `high` is"):
        check_box(low, high)
