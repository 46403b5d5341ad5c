# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line of the studies, and the Space; `.ci/examples` runs the scripts."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from study_tools import command_line

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt


ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "examples" / "studies"
# modules in a folder with an __init__ are no scripts
SCRIPTS = [
    path
    for path in sorted(STUDIES.rglob("*.py"))
    if not (path.parent / "__init__.py").exists() and path.name != "shared.py"
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_study_says_what_it_needs_and_takes_and_writes(path):
    tree = ast.parse(path.read_text())
    first = next(node for node in tree.body[1:] if not getattr(node, "module", "").startswith("__future__"))

    assert ast.unparse(first).endswith("import command_line")  # before packages that may be missing
    assert "command_line.Parser" in [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_study_says_which_page_shows_it(path):
    if path.name == "run_all.py":
        return

    (pages,) = re.findall(r"^Shown in (.*)\.$", ast.get_docstring(ast.parse(path.read_text())), re.MULTILINE)

    for page in pages.split(" and "):
        assert path.stem in (ROOT / page).read_text(), page


def test_each_study_is_in_the_table_of_the_folder():
    table = (STUDIES / "README.md").read_text() + (STUDIES.parent / "README.md").read_text()

    missing = [path.name for path in SCRIPTS if path.name not in table]

    assert missing == []


@pytest.mark.parametrize(("name", "lines"), [("adapt", 60), ("own_kind", 60), ("pde", 60), ("quickstart", 150)])
def test_scripts_to_copy_are_short(name, lines):
    text = (ROOT / "examples" / f"{name}.py").read_text()

    assert len(text.splitlines()) <= lines
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("folder", [".", "pde", "new"])
def test_quick_results_never_replace_committed_ones(folder, capsys):
    fields = {"takes": "a minute", "writes": "a.json", "folder": command_line.RESULTS, "quick": "little"}

    with pytest.raises(SystemExit):
        command_line.Parser("A study.", **fields).parse_args(
            ["--quick", "--output", str(command_line.RESULTS / folder)]
        )
    assert "committed results" in capsys.readouterr().err


def test_missing_data_are_one_line_before_anything_runs(tmp_path, capsys):
    parser = command_line.Parser("A study.", takes="a minute", writes="a.json", folder=command_line.RESULTS)
    parser.add_argument("--data-dir", type=Path)

    with pytest.raises(SystemExit):
        parser.parse_args(["--output", str(tmp_path / "new"), "--data-dir", str(tmp_path)])

    (line,) = capsys.readouterr().err.splitlines()

    assert f"--data-dir {tmp_path}: no file of images" in line
    assert not (tmp_path / "new").exists()

    (tmp_path / "images-idx3-ubyte.gz").touch()

    assert parser.parse_args(["--output", str(tmp_path / "new"), "--data-dir", str(tmp_path)]).data_dir == tmp_path


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('none', name='matplotlib')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, str(STUDIES / "pde" / "shapes.py"), "--help"]

    done = subprocess.run(command, capture_output=True, text=True, env=env)

    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert 'matplotlib is not installed: pip install -e ".[examples]"' in line


def test_studies_that_have_ended_are_not_repeated_and_failures_are_told(tmp_path, monkeypatch, capsys):
    import run_all

    (tmp_path / "good.py").write_text("print('ran')")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(run_all, "STUDIES", [(str(tmp_path / name), [], []) for name in ("good.py", "bad.py")])
    monkeypatch.setattr(run_all.machine, "commit", lambda: "abc")
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--output", str(tmp_path)])
    for end in ("good.py: ended", "good.py: done"):
        with pytest.raises(SystemExit, match=r"1 of 2 failed: .*bad\.py"):
            run_all.main()
        assert end in capsys.readouterr().out


def test_the_family_of_the_space_loads_and_predicts():
    import burgers
    from safetensors.torch import load_file

    from peft_lotra import ParametricAdapter

    space, base = ROOT / "examples" / "space", burgers.network()
    base.load_state_dict(load_file(space / "family" / "base.safetensors"))
    family = ParametricAdapter.from_pretrained(base, space / "family", burgers.terms_of)
    rows, nu = burgers.grid(33), 0.04  # between two members
    exact = burgers.reference(rows, nu)
    predicted, refined = (
        (made.apply(burgers.solution, rows) - exact).norm() / exact.norm()
        for made in (family.predict(nu), family.refine(nu))
    )
    assert 3 * refined < predicted < 0.03
    header = (space / "README.md").read_text().split("---")[1]
    assert all(entry in header for entry in ("sdk: gradio", "app_file: app.py", "license: apache-2.0"))


def test_the_formula_of_a_saved_adapter(tmp_path):
    """A sine that is shifted by a half period is printed without the shift."""
    torch.manual_seed(0)
    kan = KAN([2, 1], grid_size=20, dtype=torch.float64)
    kan.save_pretrained(tmp_path / "kan")
    x = torch.rand(500, 2, dtype=torch.float64) * 2 - 1
    y = kan(x).detach() + torch.sin(3 * x[:, :1] - torch.pi)
    model = get_peft_model(kan, LoTRAConfig(r="full"))
    LevenbergMarquardt(model).fit([(lambda model, x, y: model(x) - y, (x, y))], 20, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="angle,load", comments="")

    command = [sys.executable, ROOT / "docs/recipes/find_formula.py", "kan", "adapter", "x.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout == "x0 = angle, x1 = load\noutput 0: -1.0*sin(3.0*x0), misfit 0.0%\n"


def test_the_space_reads_drawn_digits_with_the_adapter():
    """Bitmaps of scikit-learn's digits stand for drawings."""
    import digits

    model = digits.load()
    images, labels = load_digits(return_X_y=True)
    right = np.zeros(2)
    for image, label in zip(images[:100].reshape(-1, 8, 8), labels, strict=False):
        drawing = np.kron(image > 7, np.ones((30, 30)))
        answers = digits.read(model, digits.scan(drawing))
        right += [max(answer, key=answer.get) == str(label) for answer in answers]

    assert right[1] > right[0] + 30
