# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Raw errors become clear ones: given, expected, remedy."""

from __future__ import annotations

import json

import pytest
import torch
from hostile import (
    CLEAR,
    CONFIG,
    FIELDS,
    WEIGHTS,
    Net,
    adapted,
    assert_load_refused,
    assert_refused,
    edit_config,
    outcome,
    save,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from typer.testing import CliRunner

import peft_lotra
from peft_lotra import LoTRAConfig, hotswap_adapter, write_model_card
from peft_lotra.kan import KAN, jet, laplacian, refine_grid
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.pde import continuation, knot_density
from peft_lotra.plotting import edge_changes, plot_history, plot_network_change


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "adapter", modules_to_save=["head"])


##########################
# Configs                #
##########################

BROKEN = ["(", "[a", "*", "(?P<x", "a{5,1}", "(?<=a+)b", r"\1", "(" * 5000 + ")" * 5000, "a{99999999999999999999}"]


def fields_with(field, pattern):
    layers = {"layers_to_transform": [0], "target_modules": None} if field == "layers_pattern" else {}
    return {field: FIELDS[field](pattern), **layers}


@pytest.mark.parametrize("pattern", BROKEN, ids=lambda pattern: pattern[:12])
@pytest.mark.parametrize("field", FIELDS)
def test_a_broken_pattern_of_a_file(folder, field, pattern):
    edit_config(folder, **fields_with(field, pattern))
    bare = Net()
    error, wrong = outcome(lambda: PeftModel.from_pretrained(bare, folder), bare)
    assert not wrong
    assert error is None or isinstance(error, CLEAR), f"raw {type(error).__name__}: {str(error)[:200]}"


@pytest.mark.parametrize("field", FIELDS)
def test_a_broken_pattern_of_the_user(field):
    bare = Net()
    call = lambda: get_peft_model(bare, LoTRAConfig(**fields_with(field, "(")))  # noqa: E731
    assert_refused(call, bare, error=ValueError, match=field)


DOORS = {
    "load": lambda folder: PeftModel.from_pretrained(Net(), folder),
    "add": lambda folder: adapted().load_adapter(folder, adapter_name="another"),
    "reload": lambda folder: adapted().load_adapter(folder, adapter_name="default"),
    "config": lambda folder: LoTRAConfig.from_pretrained(folder),
    "hotswap": lambda folder: hotswap_adapter(adapted(), folder),
    "card": lambda folder: write_model_card(None, folder),
}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"peft_type": "LOTRA", "r": ' + "9" * 5000 + "}",
        "[]",
        "3",
        "null",
        '"LOTRA"',
        "{}",
    ],
    ids=["lists", "objects", "digits", "list", "number", "null", "string", "empty"],
)
@pytest.mark.parametrize("door", DOORS)
def test_absurd_json(folder, door, content):
    (folder / CONFIG).write_text(content)
    error, _ = outcome(lambda: DOORS[door](folder))
    if content == "{}" and door == "config":
        return  # a config of defaults
    assert isinstance(error, CLEAR), f"raw {type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "[]", "{}", '{"r": ' + "9" * 5000 + "}", '{"cls": 1}', '{"self": 1, "r": []}'],
    ids=["lists", "objects", "list", "empty", "digits", "cls", "self"],
)
@pytest.mark.parametrize("door", [door for door in DOORS if door != "card"])  # which reads the other one
def test_absurd_json_after_an_interrupted_save(folder, tmp_path, door, content):
    """The config beside, which counts if the other one has the digest of other tensors."""
    other = save(tmp_path / "other", modules_to_save=["head"])
    (folder / CONFIG).write_bytes((other / CONFIG).read_bytes())
    (folder / f".{CONFIG}.next").write_text(content)
    error, _ = outcome(lambda: DOORS[door](folder))
    assert (error is None and content in ("{}", '{"cls": 1}')) or isinstance(error, CLEAR), f"raw {error!r}"


@pytest.mark.parametrize("kind", ["byte order mark", "UTF-16", "cut off", "digits"])
@pytest.mark.parametrize("door", [door for door in DOORS if door != "card"])
def test_a_config_that_no_parser_reads(folder, door, kind):
    """The error was that of the parser, which names no file: "line 1 column 1"."""
    text = (folder / CONFIG).read_text()
    if kind == "digits":
        text = text.replace('"r": 2', '"r": ' + "9" * 5000)
    encoding = {"byte order mark": "utf-8-sig", "UTF-16": "utf-16"}.get(kind, "utf-8")
    (folder / CONFIG).write_text(text[:-9] if kind == "cut off" else text, encoding=encoding)
    error, _ = outcome(lambda: DOORS[door](folder))
    assert type(error) is ValueError and CONFIG in str(error) and "JSON in UTF-8" in str(error)


# read by PEFT before this package
@pytest.mark.parametrize("kind", [None, 3, True, "", "NOPE", "lotra", [], {}, ["LOTRA"]], ids=repr)
@pytest.mark.parametrize("door", ["load", "add"])
def test_a_type_that_there_is_not(folder, door, kind):
    edit_config(folder, peft_type=kind)
    error, _ = outcome(lambda: DOORS[door](folder))
    assert isinstance(error, ValueError) and "peft_type" in str(error)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_folder_in_the_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_load_refused(folder, match=name)


VALUES = ["text", 7, 1.5, ["a"], {"a": 1}, True]
FREE = [
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "peft_version",
    "init_weights",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "r",
    "alpha",
    "layers_to_transform",
    "layers_pattern",
    "base_layers",
    "base_digest",
    "integrity",
    "inference_mode",
]


@pytest.mark.parametrize("field", FREE)
@pytest.mark.parametrize("door", ["load", "inspect", "card", "hotswap"])
def test_fields_of_another_type(folder, field, door):
    from peft_lotra.cli import app

    raw, original = [], (folder / CONFIG).read_text()
    for value in VALUES:
        (folder / CONFIG).write_text(original)
        edit_config(folder, **{field: value})
        if door == "load":
            bare = Net()
            error, wrong = outcome(lambda bare=bare: PeftModel.from_pretrained(bare, folder), bare)
            raw += [(value, wrong)] if wrong else []
        elif door == "hotswap":
            live = adapted(modules_to_save=["head"])
            error, wrong = outcome(lambda live=live: hotswap_adapter(live, folder), live)
            raw += [(value, wrong)] if wrong else []
        elif door == "card":
            error, _ = outcome(lambda: write_model_card(None, folder))
        else:
            result = CliRunner().invoke(app, ["inspect", str(folder)])
            error = result.exception if result.exit_code not in (0, 1) else None
            # what a user cannot act upon begins with the name of a class
            if result.exit_code == 1 and any(name in result.output for name in ("AttributeError", "TypeError")):
                raw.append((value, result.output[:100]))
        if error is not None and not isinstance(error, CLEAR):
            raw.append((value, f"{type(error).__name__}: {str(error)[:80]}"))
    assert not raw, raw


@pytest.mark.parametrize("source", ["user", "file"])
def test_modules_to_save_as_a_string(folder, source):
    bare = Net()
    if source == "file":
        edit_config(folder, modules_to_save="head")
        error, wrong = outcome(lambda: PeftModel.from_pretrained(bare, folder), bare)
    else:
        error, wrong = outcome(lambda: get_peft_model(bare, LoTRAConfig(modules_to_save="head")), bare)
    assert not wrong
    if error is None:
        assert bare.head.weight is None or hasattr(bare.head, "modules_to_save")
    else:
        assert isinstance(error, ValueError) and "modules_to_save" in str(error)


def test_inspect_says_it_in_words(folder):
    from peft_lotra.cli import app

    (folder / CONFIG).write_text(json.dumps({"peft_type": "LOTRA", "alpha_pattern": {"(": 1.0}}))
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code in (0, 1) and "PatternError" not in result.output and "re.error" not in result.output


##########################
# State dicts            #
##########################

ENTRIES = {
    "number": 3,
    "none": None,
    "array": torch.zeros(2, 2, 2).numpy(),
    "meta": torch.zeros(2, 2, 2, device="meta"),
    "sparse": torch.zeros(2, 2, 2).to_sparse(),
    "text": "core",
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_entries_of_a_state_dict_that_are_no_tensors(kind):
    model = adapted()
    state = get_peft_model_state_dict(model)
    core = next(name for name in state if "core" in name)
    assert_refused(lambda: set_peft_model_state_dict(model, {**state, core: ENTRIES[kind]}), model, match="core")


def test_a_state_dict_by_numbers():
    model = adapted()
    state = dict(enumerate(get_peft_model_state_dict(model).values()))
    assert_refused(lambda: set_peft_model_state_dict(model, state), model, match="no name")


##########################
# What is no model       #
##########################

TAKE_A_MODEL = {
    "slim": lambda model: peft_lotra.slim(model, energy=0.9),
    "to_dense": peft_lotra.to_dense,
    "find_kan_layers": peft_lotra.find_kan_layers,
    "extract_lotra": lambda model: peft_lotra.extract_lotra(model, Net(), 2),
    "extract_lotra, tuned": lambda model: peft_lotra.extract_lotra(Net(), model, 2),
    "update_spectrum": lambda model: peft_lotra.update_spectrum(model, Net()),
    "gradient_spectrum": lambda model: peft_lotra.gradient_spectrum(model, None, lambda: None),
    "preprocess_lotra": lambda model: peft_lotra.preprocess_lotra(
        model, LoTRAConfig(init_weights="gradient"), lambda: None
    ),
    "model_summary": peft_lotra.model_summary,
    "check_kan_layer": peft_lotra.check_kan_layer,
    "create_lotra_optimizer": lambda model: peft_lotra.create_lotra_optimizer(model, torch.optim.Adam, lr=0.01),
    "hotswap_adapter": lambda model: hotswap_adapter(model, "folder"),
    "refit_adapters": lambda model: peft_lotra.refit_adapters(model, torch.zeros(2, 3)),
    "write_model_card": lambda model: write_model_card(model, "folder"),
    "save_adapter": lambda model: peft_lotra.save_adapter(model, "folder"),
    "jet": lambda model: jet(model, torch.zeros(2, 3)),
    "laplacian": lambda model: laplacian(model, torch.zeros(2, 3)),
    "refine_grid": lambda model: refine_grid(model, 8),
    "LevenbergMarquardt": LevenbergMarquardt,
    "edge_changes": edge_changes,
    "plot_network_change": plot_network_change,
    "plot_history": plot_history,
    "knot_density": lambda model: knot_density(model, [-1], [1]),
    "continuation": lambda model: continuation(model, lambda value: None, 1.0, 0.1),
}


@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_what_is_no_model(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for thing in (3, "model", KAN, LoTRAConfig(), [Net()], Net().state_dict(), torch.zeros(2)):
        with pytest.raises((TypeError, ValueError), match="model|base|tuned|layer|history"):
            TAKE_A_MODEL[name](thing)
    assert not list(tmp_path.iterdir())
