# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


STUDY = Path(__file__).parents[2] / "examples" / "studies" / "parametric" / "study.py"


def test_the_study_runs(tmp_path):
    command = [sys.executable, str(STUDY), "--quick", "--problem", "burgers", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    result = json.loads((tmp_path / "quick_burgers_0.json").read_text())
    assert result["members"] == 10 and len(result["rows"]) == 3
    assert result["medians"]["predicted"] < result["medians"]["nearest"]
    assert (tmp_path / "quick_errors.png").stat().st_size > 1000
