# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The public names, and those that are gone."""

import importlib
import re

import pytest

import peft_lotra


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
