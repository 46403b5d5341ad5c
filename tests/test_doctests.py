# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The examples of the docstrings run, each by itself in an empty folder."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import peft_lotra


OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Parser(doctest.DocTestParser):
    """Leaves out the fences of Markdown around an example, which would be read as its output."""

    def parse(self, string, name="<string>"):
        lines = string.splitlines(keepends=True)
        return super().parse("".join("\n" if line.strip().startswith("```") else line for line in lines), name)


FINDER = doctest.DocTestFinder(parser=Parser(), exclude_empty=True)
NAMES = sorted({"peft_lotra", *(m.name for m in pkgutil.walk_packages(peft_lotra.__path__, "peft_lotra."))})
EXAMPLES = [found for name in NAMES for found in FINDER.find(importlib.import_module(name), name) if found.examples]
PACKAGES = [module for module in map(importlib.import_module, NAMES) if hasattr(module, "__all__")]
# what a reader has imported already: torch, the public names, and the names of the module that the example is in
NAMESPACE = {"__name__": "example", "torch": torch, "nn": torch.nn} | {
    name: getattr(module, name) for module in PACKAGES for name in module.__all__
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example.globs = NAMESPACE | example.globs
    report = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)

    assert not report, "".join(report)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_each_public_name_has_an_example(package):
    documented = {name: getattr(package, name).__doc__ for name in package.__all__ if name != "__version__"}

    assert [name for name, docstring in documented.items() if ">>> " not in docstring] == []
