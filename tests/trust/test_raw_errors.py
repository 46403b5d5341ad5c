# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Raw errors become clear ones: given, expected, remedy."""

from __future__ import annotations

import json

import pytest
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
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_lotra import LoTRAConfig, hotswap_adapter, write_model_card


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
