# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Transfer to targets that move the solution: ranks keep their budget, references are new, and the study runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "studies" / "pde"


@pytest.mark.parametrize("width", [10, 32, 64])
def test_adapters_have_two_fifths_of_the_parameters_at_most(pde, width) -> None:
    moves, recipe = pde("problems.moves"), pde("problems.recipe")
    setting, problem = moves.SETTINGS[width], moves.PROBLEMS["helmholtz"]
    base = recipe.constrained(problem, recipe.new_network(problem, setting.base))
    total = moves.trainable(base)
    shares = {
        key: moves.trainable(m.model(base, setting, 0)) / total for key, m in moves.METHODS.items() if m.lr is None
    }
    assert shares.pop("full_lm") == 1
    assert all(0.05 < share <= 0.4 for share in shares.values())
    assert 0.2 < shares["lora_lm"] <= 0.4  # its ranks are coarse
    assert shares["equal_core_lm"] == pytest.approx(shares["lotra_lm"], rel=0.1)


def test_targets_have_solutions_of_their_own(pde) -> None:
    moves, standard = pde("problems.moves"), pde("problems.standard")
    before, after = standard.PROBLEMS["helmholtz"], moves.MOVES["helmholtz"]
    assert (before.reference() - after.reference()).norm() > after.reference().norm()
    x = after.points()
    expected = torch.sin(torch.pi * x[:, :1]) * torch.sin(5 * torch.pi * x[:, 1:])
    torch.testing.assert_close(after.reference(), expected)
    burgers = [problem.solve(800, problem.stop) for problem in (standard.PROBLEMS["burgers"], moves.MOVES["burgers"])]
    slopes = [abs(u[127, -1] - u[128, -1]) for u in burgers]  # across the shock
    assert slopes[1] > 1.5 * slopes[0]


def test_errors_are_read_at_any_time(pde) -> None:
    moving_targets = pde("moving_targets")
    curve = [(0, 0.0, 1.0), (5, 2.0, 0.01), (9, 4.0, 0.001)]
    assert moving_targets.error_at(curve, 1.0) == pytest.approx(0.1)
    assert moving_targets.error_at(curve, 9.0) == pytest.approx(0.001)
    runs = {"full_lm": [{"seed": 1, "seconds": 4.0, "curve": [(0, 0.0, 1.0), (5, 2.0, 0.05), (9, 4.0, 0.2)]}]}
    runs["core_lm"] = [{"seed": 1, "curve": curve}, {"seed": 2, "curve": curve}]
    assert moving_targets.ratios(runs, "core_lm") == [pytest.approx(0.2)]  # seed 2 has no rival


def test_the_study_runs_and_keeps_what_it_has(pde, tmp_path, monkeypatch, capsys) -> None:
    moving_targets = pde("moving_targets")
    arguments = ["moving_targets.py", "--quick", "--problems", "helmholtz", "--output", str(tmp_path)]
    arguments += ["--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", arguments)
    moving_targets.main()
    path = tmp_path / "moving_targets_quick.json"
    record = json.loads(path.read_text())
    runs = record["results"]["helmholtz"]["10"]
    assert set(runs) == {*moving_targets.METHODS, "extracted_lm"} == set(moving_targets.TITLES)
    for (run,) in runs.values():
        assert run["error"] > 0 and run["bytes"] > 0 and len(run["curve"]) > 1
        assert [point[1] for point in run["curve"]] == sorted(point[1] for point in run["curve"])
    assert runs["core_lm"][0]["parameters"] < runs["full_lm"][0]["parameters"]
    assert record["bases"]["helmholtz"]["10"][0]["error_at_target"] > 0
    assert path.with_suffix(".md").read_text().count("Helmholtz") == len(runs) + 1
    assert path.with_suffix(".png").stat().st_size > 10_000
    # nothing that is there is run again
    monkeypatch.setattr(moving_targets, "run", None)
    monkeypatch.setattr(moving_targets, "SETTINGS", {10: moving_targets.QUICK_SETTING})
    path.rename(tmp_path / "moving_targets.json")
    monkeypatch.setattr(sys, "argv", [arguments[0], *arguments[2:], "--seeds", "1", "--widths", "10"])
    moving_targets.main()
    assert (tmp_path / "moving_targets.md").exists()


def test_the_tables_have_the_numbers_of_the_results(pde, tmp_path) -> None:
    moving_targets = pde("moving_targets")
    folder = FOLDER.parent / "results" / "pde"
    record = json.loads((folder / "moving_targets.json").read_text())
    limits = {width: setting["seconds"] for width, setting in record["recipe"].items()}
    found = moving_targets.headline(record["results"], limits)
    assert found in (folder / "moving_targets.md").read_text()
    assert moving_targets.markdown(record["results"], limits) in (folder / "moving_targets.md").read_text()
    assert found in (FOLDER.parents[2] / "docs" / "pde.md").read_text()
    moving_targets.draw(record["results"], limits, "32", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
