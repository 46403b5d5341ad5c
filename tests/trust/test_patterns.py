# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Patterns out of files: none is given to a backtracking engine unbounded."""

from __future__ import annotations

import random
import time

import pytest
from hostile import CONFIG, FIELDS, Net, adapted, assert_refused, edit_config, edit_tensors, outcome, save, time_limit
from peft import PeftModel
from typer.testing import CliRunner

from peft_lotra import LoTRAConfig, hotswap_adapter, write_model_card
from peft_lotra.hub.contents import read_adapter


SECONDS = 1.0  # a load takes 0.02

HANGING = {
    "optional characters": ".?" * 60 + "Z",
    "optional groups": "(?:.|)" * 60 + "Z",
    "four stars": ".*.*.*.*Z",
    "nested plus": "(a+)+$",
}


def put(folder, field, pattern, **changes):
    layers = {"layers_to_transform": [0], "target_modules": None} if field == "layers_pattern" else {}
    edit_config(folder, **{field: FIELDS[field](pattern), **layers, **changes})


def long_names(folder, length=3000):
    """Names of layers, in the config and of the tensors, that make a pattern slow."""
    name = "a" * length + "!"
    layer = {"family": "own", "shape": [4, 3, 8], "has_residual": True}

    def rename(tensors):
        for key in [key for key in tensors if "kan.layers.0." in key]:
            tensors[key.replace("kan.layers.0", name)] = tensors.pop(key)

    edit_tensors(folder, rename)
    edit_config(folder, base_layers={name: layer}, base_digest=None)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", HANGING)
def test_loading(tmp_path, field, kind):
    put(save(tmp_path / "a"), field, HANGING[kind])
    model = Net()
    with time_limit(SECONDS):
        error, wrong = outcome(lambda: PeftModel.from_pretrained(model, tmp_path / "a"), model)
    assert error is None or isinstance(error, (ValueError, OSError)), repr(error)
    assert not wrong


@pytest.mark.parametrize("kind", HANGING)
def test_loading_where_the_names_come_from_the_file(tmp_path, kind):
    save(tmp_path / "a")
    long_names(tmp_path / "a")
    put(tmp_path / "a", "rank_pattern", HANGING[kind])
    model = Net()
    with time_limit(SECONDS):
        error, _ = outcome(lambda: PeftModel.from_pretrained(model, tmp_path / "a"), model)
    assert isinstance(error, (ValueError, OSError)), repr(error)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_hotswap(tmp_path, field):
    put(save(tmp_path / "a"), field, HANGING["optional characters"])
    model = adapted()
    with time_limit(SECONDS):
        error, wrong = outcome(lambda: hotswap_adapter(model, tmp_path / "a"), model)
    assert (error is None or isinstance(error, (ValueError, OSError))) and not wrong


@pytest.mark.parametrize("kind", HANGING)
def test_inspect(tmp_path, kind):
    from peft_lotra.cli import app

    save(tmp_path / "a")
    long_names(tmp_path / "a")
    put(tmp_path / "a", "alpha_pattern", HANGING[kind])
    with time_limit(SECONDS):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])
    assert result.exit_code in (0, 1) and (result.exception is None or isinstance(result.exception, SystemExit))


@pytest.mark.parametrize("kind", HANGING)
def test_a_model_card(tmp_path, kind):
    save(tmp_path / "a")
    long_names(tmp_path / "a")
    put(tmp_path / "a", "alpha_pattern", HANGING[kind])
    with time_limit(SECONDS):
        error, _ = outcome(lambda: write_model_card(None, tmp_path / "a"))
    assert error is None or isinstance(error, (ValueError, OSError)), repr(error)


def generated(rng):
    """A pattern from a grammar of what makes backtracking engines slow."""
    atoms = ["a", ".", "[^!]", r"\w", "(?:a|a)", "(?:.|)", "(a|ab)", "(?=a)", "(?:a*)", "(?:a?b?)"]
    repeats = ["", "", "?", "*", "+", "{1,9}", "*?", "+?", "??", "{0,40}"]
    parts = [rng.choice(atoms) + rng.choice(repeats) for _ in range(rng.randrange(1, 6))]
    body = "".join(parts)
    if rng.random() < 0.4:
        body = f"({body}){rng.choice(['*', '+', '{1,20}', '?'])}"
    return body * rng.choice([1, 1, 2, 8, 30]) + rng.choice(["", "$", "Z", "!!"])


def test_fuzz(tmp_path):
    """40 through all doors; see below for more of them."""
    from peft_lotra.cli import app

    rng, slow = random.Random(0), []
    save(tmp_path / "a")
    long_names(tmp_path / "a", 60)
    for _ in range(40):
        pattern = generated(rng)
        put(tmp_path / "a", "alpha_pattern", pattern)
        put(tmp_path / "a", "rank_pattern", pattern)
        started = time.perf_counter()
        with time_limit(SECONDS):
            outcome(lambda: PeftModel.from_pretrained(Net(), tmp_path / "a"))
            CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])
        slow.append(time.perf_counter() - started)
    assert max(slow) < 0.5


COUNT = 300  # 10,000 outside of CI: at most 50 ms each, with the reading of the files


def test_fuzz_of_configs(tmp_path):
    rng, slow = random.Random(1), []
    save(tmp_path / "a")
    long_names(tmp_path / "a", 60)
    original = (tmp_path / "a" / CONFIG).read_text()
    for _ in range(COUNT):
        (tmp_path / "a" / CONFIG).write_text(original)
        put(tmp_path / "a", rng.choice([*FIELDS]), generated(rng))
        for door in (LoTRAConfig.from_pretrained, read_adapter):
            started = time.perf_counter()
            with time_limit(SECONDS):
                error, _ = outcome(lambda door=door: door(tmp_path / "a"))
            slow.append(time.perf_counter() - started)
            assert error is None or isinstance(error, ValueError), repr(error)
    assert sorted(slow)[-len(slow) // 100] < 0.05  # but for what else runs on the machine


# as many, and as long ones, as a file may have: literals, which are compared
@pytest.mark.parametrize(
    "pattern",
    [
        lambda: {f"x{i}": 1 for i in range(15_000)},
        lambda: {"|".join("ab" for _ in range(30_000)): 1},
        lambda: {"." * 100_000: 1},
        lambda: {f"{i}." * 2000: 1 for i in range(8)},
    ],
)
def test_literals_are_fast(tmp_path, pattern):
    save(tmp_path / "a")
    layer = {"family": "own", "shape": [4, 3, 8], "has_residual": True}
    edit_config(
        tmp_path / "a",
        rank_pattern=pattern(),
        base_layers={f"{i}" + ".a" * 490: layer for i in range(500)},
        base_digest=None,
    )
    with time_limit(SECONDS):
        assert_refused(lambda: LoTRAConfig.from_pretrained(tmp_path / "a"), error=ValueError)
        read_adapter(tmp_path / "a")


UNLOADABLE = {
    "long": {"alpha_pattern": {f"^{'x' * 900}{i}": 2.0 for i in range(120)}},
    "long regexes": {"rank_pattern": {f"kan.layers.0|{'x' * 900}{i}": 3 for i in range(120)}},
}


@pytest.mark.parametrize("kind", UNLOADABLE)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, kind):
    """Nor are the tensors: they would be written over those of the adapter that lies there."""
    save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = adapted(**UNLOADABLE[kind])
    assert_refused(lambda: model.save_pretrained(tmp_path), model, error=ValueError)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    model.save_pretrained(tmp_path, selected_adapters=[])
