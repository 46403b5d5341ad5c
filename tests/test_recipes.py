# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The recipes in docs/recipes run from top to bottom, where what they import is installed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch


RECIPES = sorted((Path(__file__).parents[1] / "docs" / "recipes").glob("*.md"))
_LIBRARIES = ("neuralforecast", "qkan", "sklearn", "transformers")

pytestmark = pytest.mark.slow


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"language_model", "u_kan", "convolutional_vgg", "neuralforecast"}


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks)
    for library in _LIBRARIES:
        if re.search(rf"^from {library}\b|^import {library}\b", code, re.MULTILINE):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "recipe"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries; ours are tested elsewhere
        for block in blocks:
            line = text[: text.index(block)].count("\n")
            exec(compile("\n" * line + block, str(path), "exec"), names)  # lines as in the page
