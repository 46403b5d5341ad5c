# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The standard problems: references that do not use KANs fit the residuals, and the study runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "studies" / "pde"
COARSE = {"burgers": 800, "allen_cahn": 120, "helmholtz": 1, "korteweg_de_vries": 128, "sine_gordon": 128}
COARSE |= {"advection": 1, "fisher": 40}


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("moving_targets", "problems", "standard", "study_tools"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["helmholtz", "sine_gordon", "burgers", "fisher"])
def test_references_do_not_change_with_the_resolution(study, name):
    problem = study("problems.standard").PROBLEMS[name]
    fine = problem.solve(round(1.5 * COARSE[name]), problem.stop)
    assert np.linalg.norm(problem.solve(COARSE[name], problem.stop) - fine) < 1e-5 * np.linalg.norm(fine)


@pytest.mark.parametrize("name", ["burgers", "korteweg_de_vries", "sine_gordon", "advection", "fisher"])
def test_references_have_small_residuals(study, name):
    """By differences on the test grid, beside the size of the derivative in time, where the solution is smooth."""
    problem = study("problems.standard").PROBLEMS[name]
    u = problem.solve(COARSE[name], problem.stop)
    early = u[:, :20]
    low, high = -problem.high[0] if problem.half else problem.low[0], problem.high[0]
    dx, dt = (high - low) / (u.shape[0] - 1), 1 / (u.shape[1] - 1)
    u_x, u_t = np.gradient(early, dx, dt, edge_order=2)
    u_xx = np.gradient(u_x, dx, axis=0, edge_order=2)
    left, scale = {
        "burgers": (u_t + early * u_x - problem.stop * u_xx, u_t),
        "korteweg_de_vries": (u_t + early * u_x + problem.stop * np.gradient(u_xx, dx, axis=0), u_t),
        "advection": (u_t + problem.stop * u_x, u_t),
        "fisher": (u_t - 5 * u_xx - problem.stop * early * (1 - early), 5 * u_xx),
        "sine_gordon": (np.gradient(u_t, dt, axis=1) - u_xx + problem.stop * np.sin(early), u_xx),
    }[name]
    inner = slice(8, -8), slice(3, -3)
    assert np.abs(left[inner]).max() < 0.05 * np.abs(scale[inner]).max()
    start = problem.lift(torch.tensor([[x, 0.0] for x in np.linspace(low, high, len(u))]))[:, 0].numpy()
    np.testing.assert_allclose(u[:, 0], start, atol=1e-6)


def test_conditions_hold_exactly(study):
    """Each model has the reference's values at the start and on the walls, before any training."""
    standard, problems = study("standard"), study("problems.standard")
    for name, problem in problems.PROBLEMS.items():
        run = standard.Run(problem, standard.QUICK, 0, standard.Console(quiet=True))
        x = problem.points()
        at = x[:, 1] == problem.low[1]
        if name == "helmholtz":
            at |= (x.abs() == 1).any(1)
        elif name in ("burgers", "allen_cahn"):
            at |= x[:, 0] == 1
        expected = torch.from_numpy(problem.solve(COARSE[name], problem.stop))
        expected = expected[len(expected) // 2 :] if problem.half else expected
        torch.testing.assert_close(run.model(x)[at, 0], expected.reshape(-1)[at], atol=2e-4, rtol=0)


def test_the_study_runs_and_keeps_what_it_has(study, tmp_path, monkeypatch):
    standard = study("standard")
    problem = study("problems.standard").PROBLEMS
    assert set(problem) == set(COARSE)
    arguments = ["standard.py", "--quick", "--problems", "helmholtz", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    standard.main()
    record = json.loads((tmp_path / "standard_quick.json").read_text())
    (run,) = record["results"]["helmholtz"]
    assert run["error"] == run["curve"][-1][2] > 0 and run["seconds"] > 0 and run["parameters"] > 0
    assert (tmp_path / "standard_quick.md").read_text().count("Helmholtz") == 1
    assert (tmp_path / "standard_quick.png").stat().st_size > 10_000
    # a run that is recorded for the recipe is not repeated
    monkeypatch.setattr(standard, "Recipe", lambda: standard.QUICK)
    (tmp_path / "standard.json").write_text(json.dumps(record))
    monkeypatch.setattr(standard.Run, "train", None)
    monkeypatch.setattr(sys, "argv", [*arguments[:1], *arguments[2:], "--seeds", "1"])
    standard.main()
    assert (tmp_path / "standard.md").exists()


@pytest.mark.parametrize("name", ["burgers", "allen_cahn", "helmholtz"])
def test_a_peer_is_trained_beside(study, name):
    pytest.importorskip("jaxkan")
    peers = study("problems.peers")
    lines = []
    run = peers.train(name, "chebyshev", 1, 1.0, lines.append, epochs=50)
    assert 0 < run["error"] < 2 and run["steps"] == 51 and len(lines) == 1
