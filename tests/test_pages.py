# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The pages that docs/render.py makes are those of their scripts; `.ci/examples` runs the scripts."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from matplotlib import pyplot


ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
render = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(render)
SHOWN = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def test_pages_are_those_of_their_scripts():
    assert len(render.scripts()) >= 10 and render.stale() == []


@pytest.mark.parametrize(("old", "new"), [("torch.manual_seed(0)", "torch.manual_seed(1)"), ("# # ", "# # On ")])
def test_a_changed_script_is_noticed(old, new, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(render, "DOCS", tmp_path / "docs")
    changed = tmp_path / "docs" / "tutorials" / "adapt.py"
    changed.write_text(changed.read_text().replace(old, new, 1))
    assert render.stale() == [changed]


def test_what_a_cell_prints_and_shows_and_draws_follows_it(tmp_path):
    pyplot.close("all")  # of other tests in this process
    script = tmp_path / "recipes" / "small.py"
    script.parent.mkdir()
    script.write_text(
        "# %% [markdown]\n# # Title\n#\n# Words\n\n# %%\nprint('printed')\n6 * 7\n\n# %%\nnothing = 1\n\n"
        "# %%\nfrom matplotlib.figure import Figure\n\n\nclass Shown(Figure):\n    def _repr_png_(self):\n"
        "        return b'a picture'\n\n\nShown()\n\n# %%\nfrom matplotlib import pyplot\n\n\npyplot.figure()\n"
    )
    text, pictures = render.page(script, run=True)
    assert "# Title\n\nWords\n\n```python\nprint('printed')\n6 * 7\n```\n\n```output\nprinted\n42\n```\n\n" in text
    assert "```python\nnothing = 1\n```\n\n```python" in text
    assert pictures["small_1.png"] == b"a picture" and pictures["small_2.png"].startswith(b"\x89PNG")
    assert text.count("```output") == 1 and "![Title](../assets/pages/small_2.png)" in text
    assert render.OUTPUT.sub("", text) == render.page(script, run=False)[0] != text


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_github_knows_the_markup(path):
    assert not re.search(r"^(!!!|\?\?\?|=== \"|--8<--) ", path.read_text(encoding="utf-8"), re.MULTILINE)
