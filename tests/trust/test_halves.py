# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The lower half of the package, which solves PDEs, works without PEFT; `test_house.py` has its imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import peft_lotra


PACKAGE = Path(peft_lotra.__file__).parent
SUPPORT = Path(__file__).parents[1] / "support"
LOWER_HALF = ["modules", "tucker", "kan", "derivatives", "least_squares", "layers", "pde"]

# `None` stands for a package that is not installed: `import peft` fails, and `find_spec` returns None.
WITHOUT_PEFT = f"""
import sys
sys.modules["peft"] = None
sys.path.append({str(SUPPORT)!r})

import json
from importlib import import_module
from pkgutil import walk_packages

for wing in {LOWER_HALF}:
    module = import_module("peft_lotra." + wing)
    for _, name, _ in walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        import_module(name)
wings = sorted({{name.split(".")[1] for name in sys.modules if name.startswith("peft_lotra.")}})

import torch
from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, solve

def poisson(model, x):  # u'' = -1, u(0) = u(10) = 0
    return jet(model, x)[2][0] + 1

solution = solve(poisson, [0], [10], distance=BoxDistance([0], [10]), steps=14, progress=False)
middle = solution.model(torch.tensor([[5.0]], dtype=torch.float64)).item()

from peft_lotra import find_kan_layers
from peft_lotra.derivatives.stages import stages_of
from stand_ins import ChebyKANLayer

layer = ChebyKANLayer(2, 3, 4)
described = [find_kan_layers(layer)[0].kind, len(stages_of(layer))]

try:
    from peft_lotra import LoTRAConfig
except ImportError as error:
    message = str(error)
print(json.dumps({{"wings": wings, "middle": middle, "described": described, "message": message}}))
"""


@pytest.fixture(scope="module")
def without_peft():
    """What works in a process that has no PEFT."""
    command = [sys.executable, "-c", WITHOUT_PEFT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_lower_half_is_imported_without_peft(without_peft):
    """Every module of it; and none of them loads a module of the upper half."""
    assert without_peft["wings"] == sorted([*LOWER_HALF, "_version"])


def test_a_pde_is_solved_without_peft(without_peft):
    """The exact solution x (10 - x) / 2 is 12.5 in the middle."""
    assert without_peft["middle"] == pytest.approx(12.5, abs=0.1)


def test_layers_of_other_libraries_are_known_without_peft(without_peft):
    """They are recognized, and `jet` differentiates them in closed form."""
    assert without_peft["described"] == ["cheby-kan", 1]


def test_a_name_of_the_upper_half_says_that_peft_is_missing(without_peft):
    """With the name that was asked for, and how to install PEFT."""
    assert "`peft_lotra.LoTRAConfig` needs PEFT" in without_peft["message"]
    assert "pip install peft" in without_peft["message"]
