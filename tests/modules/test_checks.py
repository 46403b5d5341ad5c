# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_lotra.modules.checks import as_number, check_path


@pytest.mark.parametrize("value", [2, 2.0, True + 1, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor([2.0])])
def test_numbers(value):
    assert as_number(value) == 2


@pytest.mark.parametrize(
    "value",
    [None, "2", b"2", [], {}, math.nan, math.inf, 10**400, torch.ones(2), 1j, object()],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_number(value):
    assert math.isnan(as_number(value)) and not as_number(value) > 0


def test_paths():
    for path in ("folder", Path("folder")):
        check_path(path, "folder")
    for path in (None, 3, ["folder"], b"folder"):
        with pytest.raises(TypeError, match="`folder` is .* must be a path"):
            check_path(path, "folder")
