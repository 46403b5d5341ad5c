# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_lotra.families import registry


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Families that a test registers are forgotten at its end."""
    before = dict(registry._SPECS)
    yield
    registry._SPECS.clear()
    registry._SPECS.update(before)


@pytest.fixture
def no_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the families that are inferred: for what happens to layers of no known family."""
    monkeypatch.setattr("peft_lotra.families.registry.infer_spec", lambda module: None)
