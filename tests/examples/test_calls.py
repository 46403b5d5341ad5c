# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`examples/studies/benchmarks/calls.py`, and the limits on the number of calls."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from peft_lotra.kan import KAN


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "benchmarks" / "calls.py"
LIMITS = {"get_peft_model": 600, "forward": 200}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("calls", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_named_functions_of_the_package_count(script) -> None:
    kan, calls = script.count_calls(lambda: [KAN(widths) for widths in ([2, 3], [2, 3, 1])][1])
    assert isinstance(kan, KAN)
    assert calls["kan/basis.py:moments"] == 3
    assert not any("<" in name or "torch" in name for name in calls)


def test_an_error_ends_the_counting(script) -> None:
    with pytest.raises(ZeroDivisionError):
        script.count_calls(lambda: 1 / 0)
    assert script.sys.getprofile() is None


def test_the_table(script, capsys) -> None:
    script.main(["--most", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("calls" in line and ":" in line for line in lines) == 2
    assert sum(".py:" in line for line in lines) == 2


# LIMITS OF CALLS: what a reader has to follow
@pytest.mark.parametrize("operation", LIMITS)
def test_limits(script, operation) -> None:
    calls = script.measure()[operation]
    assert calls.total() <= LIMITS[operation], calls.most_common(20)
