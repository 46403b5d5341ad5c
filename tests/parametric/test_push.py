# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family on the Hub: pushed by one process over HTTP, and pulled by another one with an empty cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, HubServer


COMMON = """
import sys, torch
import family_problems as problems
from peft_lotra import ParametricAdapter
base = problems.pretrained()
"""
PUSH = """
family = ParametricAdapter(base, problems.terms_of, ranks=4)
family.fit([2.9, 3.0, 3.1], progress=False)
torch.save(family.predict(2.95)(problems.POINTS).detach(), sys.argv[1])
family.push_to_hub("ann/family")
family.push_to_hub("ann/family", revision="second", commit_message="again")
"""
PULL = """
for revision in ("main", "second"):
    family = ParametricAdapter.from_pretrained(base, "ann/family", problems.terms_of, revision=revision)
    values = family.predict(2.95)(problems.POINTS)
    assert (values - torch.load(sys.argv[1])).abs().max() < 1e-10
    assert family.parameters == [2.9, 3.0, 3.1] and family.predict(2.95).indicator < 1
"""


@pytest.fixture(scope="module")
def hub() -> Hub:
    return Hub({"hf_ann": "ann"})


def client(code: str, folder: Path, url: str) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": url, "HF_TOKEN": "hf_ann", "HF_HOME": str(folder / str(len(code)))}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    support = Path(__file__).parents[1] / "support"
    env["PYTHONPATH"] = os.pathsep.join([str(support.parents[1]), str(support), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COMMON + code, str(folder / "values.pt")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]


def test_a_family_is_pushed_and_pulled(hub, tmp_path):
    with HubServer(hub) as server:
        client(PUSH, tmp_path, server.url)
        client(PULL, tmp_path, server.url)
    files = hub.repos["ann/family"].files("main")
    assert sorted(name for name in files if not name.startswith(".")) == [
        "README.md",
        "parametric_adapter.safetensors",
    ]
