# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of the studies are drawn again from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_tools import command_line


pytest.importorskip("matplotlib")

RESULTS = command_line.RESULTS


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_learning_rates(tmp_path: Path) -> None:
    import learning_rates

    rows = load("learning_rates_pykan")["rows"]
    for row in rows:  # a run that diverged is drawn, not left out
        row["losses"] = [float("inf") if loss is None or row["lr"] == 0.1 else loss for loss in row["losses"]]
    learning_rates.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_learning_rates_that_were_run_are_not_run_again() -> None:
    import learning_rates

    setting = {"tasks": {"teacher": {"SGD": 256}}, "seeds": {16: 2, 512: 1}, "steps": 1}
    setting |= {"library": "peft-lotra", "rates": {"SGD": [0.1, 0.2]}}
    runs = learning_rates.runs_of(setting)
    assert len(runs) == 8 and {width for _, _, _, width, _, _ in runs} == {16}
    losses, saved = dict.fromkeys(runs[:-1], 0.5), []
    learning_rates.sweep(setting, 8, losses, save=lambda: saved.append(len(losses)))
    assert saved == []  # no network is that narrow
    learning_rates.sweep(setting, 512, losses, save=lambda: saved.append(len(losses)))
    assert saved == [8] and [losses[run] for run in runs[:-1]] == [0.5] * 7 and losses[runs[-1]] > 0


def test_learning_rates_of_few_widths_keep_those_of_the_others(tmp_path: Path, monkeypatch) -> None:
    import learning_rates

    known = load("learning_rates_pykan")
    known["rows"] = [row for row in known["rows"] if (row["width"], row["lr"]) != (16, 0.1)]
    known["rows"].append({**known["rows"][0], "width": 32, "losses": [0.5]})  # of another setting
    (tmp_path / "learning_rates_pykan.json").write_text(json.dumps(known))
    monkeypatch.setattr(learning_rates, "adapt", lambda *_: 0.25)
    monkeypatch.setattr(learning_rates, "make_problem", lambda *_: None)
    arguments = ["learning_rates.py", "--library", "pykan", "--widest", "16", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    learning_rates.main()
    written = json.loads((tmp_path / "learning_rates_pykan.json").read_text())["rows"]
    assert [row for row in known["rows"] if row not in written] == []
    assert len(written) == len(known["rows"]) + 2  # one for each policy


def lines_of(axis) -> set:
    """The dashes and widths of the lines of a field."""
    found = set()
    for lines in axis.collections[1:]:  # the first are the colors
        if any(len(path.vertices) for path in lines.get_paths()):
            ((_, dashes),), (width,) = lines.get_linestyles(), set(lines.get_linewidths())
            found.add(("solid" if dashes is None else "dashed", width))
    return found


def test_the_sign_of_a_field_is_in_its_lines() -> None:
    import matplotlib.pyplot as plt
    import numpy as np
    from study_tools import pictures

    x, y = np.meshgrid(np.linspace(0, 1, 40), np.linspace(0, 1, 30), indexing="ij")
    wave = np.sin(2 * np.pi * x) * np.sin(np.pi * y)  # above zero on the left half, zero along all sides
    noise = 1e-3 * np.random.default_rng(0).standard_normal(x.shape)
    figure, axes = plt.subplots(1, 4)
    extent = (0, 1, 0, 1)
    above, below, both = (
        pictures.draw_field(ax, f, extent) for ax, f in zip(axes, (y, -y, wave + noise), strict=False)
    )
    pictures.draw_field(axes[3], noise, extent, limit=1.0)
    thin, heavy = 0.8, 1.8
    assert [lines_of(ax) for ax in axes] == [
        {("solid", thin)},
        {("dashed", thin)},
        {("solid", thin), ("dashed", thin), ("solid", heavy)},
        set(),
    ]
    (zero,) = axes[2].collections[-1].get_segments()  # none along the sides
    assert abs(zero[:, 0] - 0.5).mean() < 0.05 and np.ptp(zero[:, 1]) > 0.8
    pictures.field_bar(figure, both, axes[2])
    bar = figure.axes[-1]
    dashed = [lines.get_linestyles()[0][1] is not None for lines in bar.collections if hasattr(lines, "get_segments")]
    assert dashed[-5:] == [True, True, False, False, False]  # from below
    assert above.norm.vmax == -below.norm.vmin == 1.0
    plt.close(figure)


def test_low_rank_evidence(tmp_path: Path) -> None:
    import low_rank_evidence

    results = load("low_rank_evidence")
    low_rank_evidence.draw(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    for spectrum in results["spectra"].values():  # of each mode, the shares of the energy sum to 1
        for mode in (*spectrum["update"], *spectrum["random"]):
            assert sum(value**2 for value in mode) == pytest.approx(1, abs=1e-3)


def test_slim_functions(tmp_path: Path) -> None:
    import slim_functions

    slim_functions.draw(slim_functions.summarise(load("slim_functions")["rows"]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_transfer_has_a_panel_for_each_family(tmp_path: Path) -> None:
    from importlib import import_module

    transfer = import_module("transfer")
    runs = [run for run in load("pde/transfer")["runs"] if run["target"] == "middle"]
    transfer.draw_curves(runs, ["middle"], transfer.MAIN, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "%" in transfer.message_of(runs, ["middle"])
    assert set(transfer.LINES) == set(transfer.METHODS)
