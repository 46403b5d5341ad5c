# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""README.md and the pages of docs/ are true: their python runs as it stands, and commands and links name what exists.

The python snippets of a page run in one process, one after the other, without anything that the page does not show.
The pages that docs/render.py makes are those of their scripts; `.ci/examples` runs the scripts.
"""

import importlib
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_script
from matplotlib import pyplot

import peft_lotra


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "examples" / "README.md", ROOT / "examples" / "studies" / "README.md"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
README = TEXTS["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FENCES = [(page, language, code) for page, text in TEXTS.items() for language, code in FENCE.findall(text)]
# tests/hub/test_push.py runs those that need a Hub, against the stand-in
PYTHON = {
    page: [
        code
        for name, language, code in FENCES
        if name == page and language in ("python", "py") and "user/" not in code
    ]
    for page in TEXTS
}
SHELL = [(page, line) for page, language, code in FENCES if language in ("sh", "bash") for line in code.splitlines()]
PROSE = {page: FENCE.sub("", text) for page, text in TEXTS.items()}
LINKS = sorted(
    {(page, link) for page, text in PROSE.items() for link in re.findall(r"\]\((?!http|#)([^)\s]+)\)", text)}
)
render = load_script(ROOT / "docs" / "render.py")
SHOWN = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def test_the_readme_is_short():
    shown = re.sub(r"<!--.*?-->\n?", "", README)

    assert len(shown.splitlines()) <= 120
    assert len(shown.split()) <= 900


@pytest.mark.parametrize("task", ["pykan", "customers", "pde"])
def test_a_task_takes_minutes_to_read_and_type(task):
    """Minutes from the first word of the README to the last that is typed: 200 words are read in one, 40 typed."""
    introduction, link, _ = README.partition(f"](docs/tutorials/{task}.")
    page = (ROOT / "docs" / "tutorials" / f"{task}.py").read_text().partition("# ## Further")[0]
    typed = [line for line in page.splitlines() if not line.startswith("#")]
    read = [line for line in page.splitlines() if line.startswith("#")]

    assert link
    assert len(" ".join(typed).split()) > 50
    assert len(" ".join([introduction, *read]).split()) / 200 + len(" ".join(typed).split()) / 40 <= 12.5


def test_pages_have_snippets():
    assert len(PYTHON["README.md"]) >= 1
    assert len(SHELL) >= 2
    assert sum(bool(snippets) for snippets in PYTHON.values()) >= 8


@pytest.mark.parametrize("page", [page for page, snippets in PYTHON.items() if snippets])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "torchrun" in TEXTS[page]:  # which starts one process here
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
    names = {"__name__": "page"}

    for code in PYTHON[page]:
        exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: value)
def test_links_lead_somewhere(page, link):
    assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()


@pytest.mark.parametrize(("page", "line"), SHELL, ids=lambda value: value)
def test_commands_are_valid_shell_with_known_extras_and_options(page, line):
    subprocess.run(["bash", "-n", "-c", line], check=True)
    extras = set(",".join(re.findall(r"\.\[([\w,]+)\]", line)).split(",")) - {""}

    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))

    for script, options in re.findall(r"python[\w.]* ((?:examples|tests)/[\w/]+\.py)((?: --?[\w-]+)*)", line):
        text = (ROOT / script).read_text()
        assert all(f'"{option}"' in text for option in re.findall(r"--[\w-]+", options))


@pytest.mark.parametrize("page", TEXTS)
def test_scripts_that_are_named_exist(page):
    named = set(re.findall(r"(?<!/)\b(?:examples|tests)/[\w./-]+\.py\b", TEXTS[page]))
    assert {path for path in named if not (ROOT / path).is_file()} == set()


@pytest.mark.parametrize("page", TEXTS)
def test_public_names_that_are_called_exist(page):
    called = set(re.findall(r"peft_lotra\.(\w+)", TEXTS[page]))
    submodules = {path.stem for path in (ROOT / "peft_lotra").iterdir()}

    assert called <= submodules | set(peft_lotra.__all__)
    assert sys.modules["peft_lotra"] is peft_lotra


def test_the_reference_lists_and_shows_each_public_name():
    reference = ROOT / "docs" / "api"
    rows = re.findall(r"^\|.*\| `([\w.]+)` \| (.*) \|$", (reference / "index.md").read_text(), flags=re.MULTILINE)
    listed = {f"{package}.{name}" for package, names in rows for name in re.findall(r"`(\w+)`", names)}
    pages = "\n".join(path.read_text() for path in sorted(reference.glob("*.md")))
    shown = set(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE))
    packages = [f"peft_lotra.{path.parent.name}" for path in (ROOT / "peft_lotra").glob("*/__init__.py")]
    public = set()
    for package in ["peft_lotra", *packages]:
        public |= {f"{package}.{name}" for name in getattr(importlib.import_module(package), "__all__", [])}

    assert listed == public - {"peft_lotra.__version__"}
    assert listed <= shown


def test_pages_are_those_of_their_scripts():
    assert len(render.scripts()) >= 10
    assert render.stale() == []


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
    assert pictures["small_1.png"] == b"a picture"
    assert pictures["small_2.png"].startswith(b"\x89PNG")
    assert text.count("```output") == 1
    assert "![Title](../assets/pages/small_2.png)" in text
    assert render.OUTPUT.sub("", text) == render.page(script, run=False)[0] != text


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_github_knows_the_markup(path):
    assert not re.search(r"^(!!!|\?\?\?|=== \"|--8<--) ", path.read_text(encoding="utf-8"), re.MULTILINE)
