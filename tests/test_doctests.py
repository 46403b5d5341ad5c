# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The examples of the docstrings run, each by itself in an empty folder."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import peft_lotra
from peft_lotra import kan, optim


OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Parser(doctest.DocTestParser):
    """Leaves out the fences of Markdown around an example, which would be read as its output."""

    def parse(self, string: str, name: str = "<string>") -> list:
        lines = string.splitlines(keepends=True)
        return super().parse("".join("\n" if line.strip().startswith("```") else line for line in lines), name)


FINDER = doctest.DocTestFinder(parser=Parser(), exclude_empty=True)
NAMES = sorted({"peft_lotra", *(m.name for m in pkgutil.walk_packages(peft_lotra.__path__, "peft_lotra."))})
EXAMPLES = [found for name in NAMES for found in FINDER.find(importlib.import_module(name), name) if found.examples]
# what a reader has imported already: torch, the public names, and the names of the module that the example is in
NAMESPACE = {"__name__": "example", "torch": torch, "nn": torch.nn} | {
    name: getattr(module, name) for module in (peft_lotra, kan, optim) for name in module.__all__
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example.globs = NAMESPACE | example.globs
    report: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)

    assert not report, "".join(report)


def test_examples_are_found():
    assert any("get_peft_model" in line.source for example in EXAMPLES for line in example.examples)
