# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The public names, and what importing the package leaves for later."""

from __future__ import annotations

import subprocess
import sys

import pytest

import peft_lotra


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", peft_lotra.__all__)
def test_every_public_name_is_there(name):
    assert getattr(peft_lotra, name) is not None and name in dir(peft_lotra)


def test_names_are_sorted_and_known_to_type_checkers():
    assert peft_lotra.__all__ == sorted(peft_lotra.__all__, key=lambda name: (not name[0].isupper(), name))
    assert peft_lotra._LATER.keys() <= set(peft_lotra.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'peft_lotra' has no attribute 'nothing'"):
        getattr(peft_lotra, "nothing")  # noqa: B009
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(peft_lotra.kan, "nothing")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from peft_lotra import nothing")


def test_what_an_import_leaves_for_later():
    code = "import sys, peft_lotra; print([m for m in ('optim', 'compress', 'pde', 'summary') if {}])"
    assert run(code.format("f'peft_lotra.{m}' in sys.modules")) == "[]"
    code = "import peft_lotra; print({})"
    assert run(code.format("peft_lotra.optim.LevenbergMarquardt.__name__")) == "LevenbergMarquardt"
    assert run(code.format("peft_lotra.pde.HardConstraint.__name__")) == "HardConstraint"
    assert run("from peft_lotra import *; print(push_to_hub.__name__)") == "push_to_hub"
