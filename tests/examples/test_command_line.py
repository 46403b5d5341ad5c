# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line of the studies: what --help says, and that a mistake is one line and a non-zero exit."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from study_tools import command_line


# what lies in a folder with an __init__ is no script
SCRIPTS = [p for p in sorted(command_line.STUDIES.rglob("*.py")) if not (p.parent / "__init__.py").exists()]


def make_parser(**options) -> command_line.Parser:
    fields = {"takes": "a minute", "writes": "a.json", "folder": command_line.RESULTS, "quick": "little"} | options
    return command_line.Parser("What it does.", **fields)


def refused(capsys, parser: command_line.Parser, *arguments: str) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as error:
        parser.parse_args(arguments)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_says_what_it_needs_and_takes_and_writes(path: Path) -> None:
    tree = ast.parse(path.read_text())
    first = next(node for node in tree.body[1:] if not getattr(node, "module", "").startswith("__future__"))
    assert ast.unparse(first).endswith("import command_line")  # before what may be missing
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "command_line.Parser" in calls and "argparse.ArgumentParser" not in calls


def test_the_help_has_needs_time_and_files() -> None:
    text = make_parser(needs="test").format_help()
    assert 'pip install -e ".[test]"' in text and "a minute" in text and "a.json" in text
    assert "examples/studies/results" in " ".join(text.split())


def test_quick_results_go_to_the_ignored_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(command_line, "STUDIES", tmp_path / "examples" / "studies")
    monkeypatch.setattr(command_line, "OUTPUT", tmp_path / "examples" / "studies" / "output")
    parser = make_parser(folder=command_line.STUDIES / "results")
    assert parser.parse_args([]).output == command_line.STUDIES / "results"
    assert parser.parse_args(["--quick"]).output == command_line.OUTPUT


def test_the_folder_of_quick_results_is_ignored_by_git() -> None:
    command = ["git", "check-ignore", "examples/studies/output/a.json"]
    done = subprocess.run(command, cwd=command_line.STUDIES.parents[1], capture_output=True)
    assert done.returncode in (0, 128)  # 128: no repository


@pytest.mark.parametrize("folder", [".", "pde", "new"])
def test_quick_never_writes_over_committed_results(folder, capsys) -> None:
    line = refused(capsys, make_parser(), "--quick", "--output", str(command_line.RESULTS / folder))
    assert "committed results" in line


def test_bad_arguments_are_one_line(capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(capsys, make_parser(), "--output", str(tmp_path / "file" / "folder"))
    assert "File exists" in refused(capsys, make_parser(), "--output", str(tmp_path / "file"))
    assert "unrecognized arguments: --fast" in refused(capsys, make_parser(), "--fast")


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [
        ("slim_functions.py", "matplotlib", "examples"),
        ("pde/transfer.py", "matplotlib", "examples"),
        ("pde/pina_solver.py", "lightning", "examples,pina"),
        ("forecast_neuralforecast.py", "neuralforecast", "examples,heavy"),
        ("beside_lycoris.py", "lycoris", "test,peers"),
        ("../quickstart.py", "matplotlib", "examples"),
    ],
)
def test_a_missing_package_is_one_line_also_for_help(script, package, extra, tmp_path) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name='{package}')")
    path = os.pathsep.join([str(tmp_path), str(command_line.STUDIES.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(command_line.STUDIES / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{package} is not installed" in line and f'".[{extra}]"' in line


SHORT = [command_line.STUDIES.parent / f"{name}.py" for name in ("adapt", "compress", "own_family", "pde")]


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_scripts_to_copy_are_short_and_say_what_they_need(path: Path) -> None:
    text = path.read_text()
    assert 25 <= len(text.splitlines()) <= 50
    (notes,) = (line for line in text.splitlines() if line.startswith("NOTES = "))
    assert all(word in notes for word in ("eeds", "takes", "writes"))


@pytest.mark.parametrize("script", ["adapt.py", "quickstart.py", "space/fit.py"])
def test_an_output_that_is_no_folder_is_one_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = str(command_line.STUDIES.parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(command_line.STUDIES.parent / script), "--output", str(tmp_path / "file" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1:] == [
        f"{Path(script).name}: error: --output {tmp_path}/file/out: Not a directory"
    ]
