# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import getpass
import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "studies" / "benchmarks"
COMMITTED = sorted((ROOT / "examples" / "studies" / "results" / "benchmarks").glob("*.json"))
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks, by its name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_subjects_run_in_turn_and_equally_often(benchmark) -> None:
    calls: list[str] = []
    subjects = {
        name: {"_back": lambda: None, "first": lambda name=name: calls.append(name), "second": lambda: None}
        for name in "abc"
    }
    result = benchmark("figures.measure").interleave(subjects, CPU, seconds=0.0, rounds=(6, 6))
    assert result["rounds"] == 6 and "skipped" not in result
    timed = [calls[6 + 3 * i : 9 + 3 * i] for i in range(6)]  # after two rounds that do not count
    assert all(sorted(turn) == ["a", "b", "c"] for turn in timed)
    assert len({tuple(turn) for turn in timed}) > 1
    for times in result["ms"].values():
        assert set(times) == {"first", "second", "total"}
        assert all(0 <= low <= middle <= high for low, middle, high in times.values())


def test_a_subject_that_takes_too_long_is_left_out_with_its_reason(benchmark, monkeypatch) -> None:
    measure = benchmark("figures.measure")
    monkeypatch.setattr(measure, "LIMIT_SECONDS", -1.0)
    result = measure.interleave({"slow": {"run": lambda: None}}, CPU, 0.0)
    assert result["ms"] == {} and "more than" in result["skipped"]["slow"]


@pytest.mark.parametrize(
    ("layer", "batch", "width", "fits"),
    [("pykan", 4096, 256, False), ("pykan", 256, 256, True), ("efficient-kan", 4096, 1024, True)],
)
def test_what_needs_too_much_memory_is_left_out_with_its_reason(benchmark, layer, batch, width, fits) -> None:
    reason = benchmark("figures.subjects").too_large(layer, batch, [width, width])
    assert (reason is None) == fits
    assert fits or "GiB" in reason


def test_quartiles(benchmark) -> None:
    quartiles = benchmark("figures.measure").quartiles
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_peak_memory_sees_what_was_freed_again(benchmark) -> None:
    command = (
        "import json, torch\n"
        "from figures import measure\n"
        "step = lambda: [torch.ones(2**24), torch.ones(2**24)] and None\n"
        "print(json.dumps({'mib': measure.peak_memory(step, torch.device('cpu'))}))"
    )
    mib = benchmark("figures.measure").in_child(["-c", command], threads=1)["mib"]
    assert 120 < mib < 160


def test_a_child_that_fails_says_why(benchmark) -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        benchmark("figures.measure").in_child(["-c", "raise ValueError('no such luck')"], threads=1)


def test_the_machine_is_described_without_its_names(benchmark) -> None:
    machine = benchmark("figures.measure").describe_machine(CPU)
    version, expected = (v.partition("+")[0] for v in (machine["versions"]["torch"], torch.__version__))
    assert version == expected and machine["threads"] == torch.get_num_threads()
    text = json.dumps(machine)
    assert socket.gethostname() not in text and getpass.getuser() not in text and "/" not in text


def test_every_method_trains_what_it_says(benchmark) -> None:
    subjects = benchmark("figures.subjects")
    for kan in subjects.KANS:
        counts = {}
        for name, adapt in subjects.METHODS.items():
            model = adapt(subjects.make_kan(kan, [3, 4], CPU))
            x = subjects.random_inputs(5, 3, CPU)
            for part in subjects.training_step(model, x, subjects.squared_error).values():
                part()
            assert x.grad.abs().min() > 0
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert all(parameter.grad.any() for parameter in trained), (kan, name)
            counts[name] = subjects.count_trainable(model)
        assert counts["frozen base"] == 0 < counts["LoTRA"]


def test_the_quick_settings_of_two_figures_go_into_one_file(benchmark, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = benchmark("run")
    options = ["--quick", "--device", "cpu", "--threads", str(torch.get_num_threads()), "--output", str(tmp_path)]
    run.main([*options, "--only", "serving"])
    serving = json.loads((tmp_path / "cpu_quick.json").read_text())["serving"]
    run.main([*options, "--only", "training_step"])
    results = json.loads((tmp_path / "cpu_quick.json").read_text())
    assert list(results) == ["training_step", "serving"]
    assert results["serving"] == serving
    for row in results["training_step"]["rows"]:
        assert all(times["total"][1] > 0 for times in row["ms"].values())
    text = (tmp_path / "cpu_quick.md").read_text(encoding="utf-8")
    assert "## Training step" in text and "## Serving" in text and str(tmp_path) not in text


def test_a_claim_that_does_not_hold_and_a_cell_that_loses_are_shown(benchmark) -> None:
    times = {"frozen base": 10.0, "LoTRA": 30.0, "full fine-tuning": 20.0, "PEFT LoRA": 40.0}
    row = {"kan": "own KAN", "widths": [1024, 1024], "batch": 1024, "loss": "squared error", "rounds": 5}
    row["ms"] = {name: {"total": [time, time, time]} for name, time in times.items()}
    claims = benchmark("figures.claims").claims_table({"training_step": {"rows": [row]}})
    assert claims.count("**no**") == 2 and "yes" not in claims  # 3x the frozen base, 1.5x full fine-tuning
    steps = benchmark("page").steps([row])
    assert "1.50 ▲" in steps and "| 0.75 |" in steps


def test_a_page_is_refused_without_its_markers(benchmark) -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        benchmark("page").with_section("# A page\n", {})


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_committed_tables_are_those_of_the_results(benchmark, file: Path) -> None:
    results = json.loads(file.read_text())
    assert benchmark("run").render(results) == file.with_suffix(".md").read_text(encoding="utf-8")
    assert str(ROOT) not in file.read_text()


@pytest.mark.parametrize("file", [file for file in COMMITTED if file.stem == "cpu"], ids=lambda file: file.stem)
def test_the_docs_say_what_the_results_say(benchmark, file: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert benchmark("page").with_section(page, json.loads(file.read_text())) == page


def test_two_checkouts_are_compared() -> None:
    command = [sys.executable, str(FOLDER / "compare.py"), str(ROOT), "--quick", "--only", "layers", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "KANLinear" in done.stdout and "layer 16, batch 64" in done.stdout


def test_what_is_no_checkout_is_refused(tmp_path) -> None:
    command = [sys.executable, str(FOLDER / "compare.py"), str(tmp_path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "no checkout of peft-lotra" in done.stderr
