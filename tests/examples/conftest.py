# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The scripts of examples/studies import the modules beside them, as scripts do."""

import importlib
import sys
from pathlib import Path

import pytest
import torch


STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
PDE = STUDIES / "pde"
sys.path += [str(STUDIES), str(PDE), str(STUDIES / "benchmarks"), str(STUDIES / "parametric")]


@pytest.fixture
def pde(monkeypatch):
    """A module of the PDE examples, by its name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(PDE))
    before = set(sys.modules)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(PDE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
