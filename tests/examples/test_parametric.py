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
    assert 2 < result["members"] <= 10 and len(result["rows"]) == 3  # fewer, where none is worth another
    # bases of four steps say nothing of accuracy: what each row of the full study has
    assert all(0 < error < 10 for row in result["rows"] for error in row["errors"].values())
    assert result["bytes_of_a_member"] == 8 * result["members"] < result["bytes_of_the_file"]
    assert (tmp_path / "quick_errors.png").stat().st_size > 1000
