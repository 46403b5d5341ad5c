# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""README.md is true: its python runs, and its commands and links name files that exist.

Each python snippet runs by itself, in an empty folder, after `SET_UP`, which makes what the text around the snippets
takes for granted: a trained `kan`, some data, the user's own layer.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_lotra


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
# tests/hub/test_push.py runs those that need a Hub, against the stand-in
PYTHON = [code for language, code in FENCES if language in ("python", "py") and "user/" not in code]
SHELL = [line for language, code in FENCES if language in ("sh", "bash", "console") for line in code.splitlines()]

SET_UP = """
import torch
from peft import PeftModel, get_peft_model
from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN
from torch import nn

torch.manual_seed(0)
x, y = torch.rand(16, 2) * 2 - 1, torch.rand(16, 1)
loss_function = nn.functional.mse_loss

class MyKANLayer(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.spline_coeffs = nn.Parameter(torch.randn(n_in, n_out, 3))
        self.base_coeffs = nn.Parameter(torch.randn(n_out, n_in))

    def forward(self, x):
        basis = torch.stack([x, x**2, x**3], -1)
        return torch.einsum("bik,iok->bo", basis, self.spline_coeffs) + nn.functional.silu(x) @ self.base_coeffs.T

kan = KAN([2, 8, 8, 1])  # the user's trained network
trained, x_train, f = kan, x, y
base, tuned = KAN([2, 8, 8, 1]), KAN([2, 8, 8, 1])  # before and after full fine-tuning
model = get_peft_model(KAN([2, 8, 8, 1]), LoTRAConfig(r=2, init_weights=False), adapter_name="a").eval()
model.add_adapter("b", LoTRAConfig(r=2, init_weights=False))
for name in ("a", "b"):
    model.save_pretrained(".", selected_adapters=[name])  # the folders "a" and "b"
"""


def test_snippets_are_found():
    assert len(PYTHON) >= 3 and len(SHELL) >= 2


@pytest.mark.parametrize("code", PYTHON, ids=[f"snippet-{index}" for index in range(len(PYTHON))])
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from peft_lotra.families import registry

    before = dict(registry._SPECS)  # what a snippet registers goes away with it
    try:
        exec(compile(SET_UP + code, "README.md", "exec"), {"__name__": "readme"})
    finally:
        registry._SPECS.clear()
        registry._SPECS.update(before)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:examples|tests)/[\w./-]+\.\w+", README))))
def test_files_that_are_named_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http|#)([^)]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target.partition("#")[0]).exists()


@pytest.mark.parametrize("line", SHELL)
def test_commands_are_sound(line):
    subprocess.run(["bash", "-n", "-c", line], check=True)
    extras = set(re.findall(r"\.\[(\w+)\]", line))
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    scripts = re.findall(r"python[\w.]* ((?:examples|tests)/[\w/]+\.py)((?: --?[\w-]+)*)", line)
    for script, options in scripts:
        text = (ROOT / script).read_text()
        assert all(f'"{option}"' in text for option in re.findall(r"--[\w-]+", options))


def test_public_names_that_are_called_exist():
    called = set(re.findall(r"peft_lotra\.(\w+)", README))
    submodules = {path.stem for path in (ROOT / "peft_lotra").iterdir()}
    assert called <= submodules | set(peft_lotra.__all__)
    assert sys.modules["peft_lotra"] is peft_lotra
