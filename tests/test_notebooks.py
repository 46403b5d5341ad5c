# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The notebooks of docs/tutorials are those of the pages, with their outputs, and install the package."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import load_script


ROOT = Path(__file__).parents[1]
notebooks = load_script(ROOT / "docs" / "notebooks.py")
NAMES = sorted(notebooks.REQUIREMENTS)


def read(name):
    return json.loads((ROOT / "docs" / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_each_notebook_is_current():
    assert NAMES == ["adapt", "pde", "pykan"]
    assert notebooks.stale() == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_has_text_and_pictures(name):
    outputs = [output for cell in read(name)["cells"] for output in cell.get("outputs", [])]

    kinds = {output["output_type"] for output in outputs}
    assert kinds == {"stream", "display_data"}
    assert (ROOT / "docs" / "tutorials" / f"{name}.ipynb").stat().st_size < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cells_open_colab_and_install_the_package(name):
    badge, install = read(name)["cells"][:2]

    assert (
        f"colab.research.google.com/github/peft-lotra/peft-lotra/blob/main/docs/tutorials/{name}.ipynb"
        in (badge["source"])
    )
    assert install["source"].startswith('%pip install -q "peft-lotra[examples] @ git+')


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_out_of_the_notebook(name):
    text = "\n".join(cell["source"] for cell in read(name)["cells"] if cell["cell_type"] == "markdown")

    assert "](../" not in text
    assert f"/blob/main/docs/tutorials/{name}.py)" in text


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of what notebooks are made of."""
    shutil.copytree(ROOT / "docs" / "tutorials", tmp_path / "docs" / "tutorials")
    shutil.copytree(ROOT / "docs" / "assets", tmp_path / "docs" / "assets")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "TUTORIALS", tmp_path / "docs" / "tutorials")
    return tmp_path


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


CHANGES = {
    "code": lambda root: replace(root / "docs/tutorials/adapt.md", "torch.manual_seed(0)", "torch.manual_seed(1)"),
    "output": lambda root: replace(root / "docs/tutorials/adapt.md", "loss on the old task: ", "loss: "),
    "picture": lambda root: shutil.copy(root / "docs/assets/pages/pde_1.png", root / "docs/assets/pages/adapt_1.png"),
    "missing": lambda root: (root / "docs/tutorials/adapt.ipynb").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_page_is_noticed(change, copied):
    CHANGES[change](copied)

    assert [path.name for path in notebooks.stale()] == ["adapt.ipynb"]


def test_another_address_of_the_repository_is_noticed(copied):
    replace(
        copied / "pyproject.toml",
        'Repository = "https://github.com/peft-lotra/',
        'Repository = "https://github.com/ann/',
    )

    stale = notebooks.stale()

    assert len(stale) == len(NAMES)
    assert all("git+https://github.com/ann/peft-lotra" in json.dumps(notebook) for notebook in stale.values())
