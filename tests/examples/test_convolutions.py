# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The study of convolutional KANs: methods at equal numbers of parameters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).parents[2] / "examples" / "studies" / "convolutions.py"


@pytest.mark.slow
def test_the_study_runs_and_keeps_its_budgets(tmp_path):
    spec = importlib.util.spec_from_file_location("convolutions_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--quick", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "convolutions_quick.json").read_text())
    assert len(results["rows"]) == 3 * len(example.SHARES) + 2
    for row in results["rows"]:
        if row["budget"]:
            assert 0 < row["parameters"] <= row["budget"]
    lotra = [row["parameters"] for row in results["rows"] if row["method"] == "LoTRA"]
    assert all(count > 0.9 * budget for count, budget in zip(lotra, results["budgets"], strict=True))
    assert "| LoTRA |" in (tmp_path / "convolutions_quick.md").read_text()
    assert (tmp_path / "convolutions_quick.png").stat().st_size > 10_000
