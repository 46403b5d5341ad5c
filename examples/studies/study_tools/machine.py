# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The machine of a measurement, which its results name."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path

import torch


def describe() -> str:
    """The processor, torch, the date and the load, in a line."""
    return f"{cpu_model()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}"


@cache
def commit() -> str:
    """The commit of the code, with a + if scripts have changed since; empty outside of a clone.

    Asked for once, at the first result: commits that are made while a study goes on are not what it runs.
    """

    def git(*args: str) -> str:
        command = ["git", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout

    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("diff", "HEAD", "--name-only", "--", "*.py"))


def cpu_model() -> str:
    """The name and generation of the processor, if the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(reversed([tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line]))
    name = fields.get("model name", platform.machine())
    family = f"family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else ""
    vector = "AVX-512" if "avx512f" in fields.get("flags", "") else "AVX2" if "avx2" in fields.get("flags", "") else ""
    return ", ".join(filter(None, (name, family, vector)))
