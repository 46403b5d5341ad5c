# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the families that are inferred: for what happens to layers of no known family."""
    monkeypatch.setattr("peft_lotra.families.registry.infer_spec", lambda module: None)
