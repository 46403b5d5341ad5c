# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import os

import pytest
import torch
from hub_server import start_hub


HUB = start_hub("user")  # before huggingface_hub is imported, which reads its address once

from peft_lotra.layers import kinds  # noqa: E402


# Workers of pytest-xdist share the cores: with a thread for each core in each of them, they wait for each other.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget():
    """Families that a test registers are forgotten at its end."""
    before = dict(kinds.REGISTERED)
    yield
    kinds.REGISTERED.clear()
    kinds.REGISTERED.update(before)


@pytest.fixture
def hub():
    """An empty stand-in for the Hub, where this process is logged in as "user"."""
    HUB.repos.clear()
    return HUB


@pytest.fixture
def no_inference(monkeypatch):
    """Without the kinds that are inferred: for what happens to layers of no known kind."""
    monkeypatch.setattr("peft_lotra.layers.recognize.infer", lambda *args: (None, "not now"))
