# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The public names, and what importing the package leaves for later."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import peft_lotra


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("name", peft_lotra.__all__)
def test_every_public_name_is_there(name):
    assert getattr(peft_lotra, name) is not None and name in dir(peft_lotra)


def test_names_are_sorted():
    assert peft_lotra.__all__ == sorted(peft_lotra.__all__, key=lambda name: (not name[0].isupper(), name))


@pytest.mark.parametrize(("name", "text"), peft_lotra._GONE.items())
def test_a_name_that_is_gone(name, text):
    with pytest.raises(AttributeError, match=f"`peft_lotra.{name}` is gone"):
        getattr(peft_lotra, name)
    if module := re.search("import it from `(.*)`", text):
        assert getattr(importlib.import_module(module[1]), name)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'peft_lotra' has no attribute 'nothing'"):
        getattr(peft_lotra, "nothing")  # noqa: B009
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(peft_lotra.kan, "nothing")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from peft_lotra import nothing")


def test_modules_that_are_imported_at_their_first_use():
    later = ("optim", "compress", "pde", "summary", "parametric", "plotting")
    code = f"import sys, peft_lotra; print([m for m in {later} if 'peft_lotra.' + m in sys.modules])"
    assert run(code) == "[]"
    names = "optim.LevenbergMarquardt, peft_lotra.pde.HardConstraint, peft_lotra.plotting.plot_spectra"
    assert run(f"import peft_lotra; peft_lotra.{names}; from peft_lotra import *; print(push_to_hub.__name__)")
