# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Libraries that the tests do without, as they are on PyPI: pip install -e ".[test,heavy,serve]", then pytest
tests/examples."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"

pytestmark = pytest.mark.slow


def test_neuralforecast(tmp_path):
    pytest.importorskip("neuralforecast")
    example = importlib.import_module("forecast_neuralforecast")
    example.main(["--steps", "20", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "forecast_neuralforecast.json").read_text())
    errors = results["mean absolute error"]
    # neuralforecast's own fit trained the adapters, and nothing else
    assert errors["LoTRA"] != errors["base"] and errors["merged"] == pytest.approx(errors["LoTRA"], abs=0.01)
    assert results["merged parameters"] == [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("base_weight", "spline_weight")
    ]
    assert (tmp_path / "neuralforecast" / "adapter_model.safetensors").exists()
    assert (tmp_path / "forecast_neuralforecast.png").stat().st_size > 10_000


def test_ray_serve(tmp_path):
    """Each answer is that of the bank, though a replica is killed and an adapter replaced meanwhile."""
    pytest.importorskip("ray")
    script = EXAMPLES.parent / "serve" / "load_test.py"
    subprocess.run([sys.executable, script, "--quick", "--output", tmp_path], check=True, timeout=280)
    results = json.loads((tmp_path / "serve.json").read_text())
    runs = [*results["runs"], results["accident"]]
    assert len(runs) == 5 and all(run["requests"] >= 200 and run["wrong"] == 0 for run in runs)
    assert results["accident"]["wrong after the reload"] == 0
