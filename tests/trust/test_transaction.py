# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A load is a transaction: what fails, or is interrupted, leaves everything as it was."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress

import pytest
import torch
from hostile import (
    CLEAR,
    CONFIG,
    WEIGHTS,
    Net,
    X,
    adapted,
    assert_load_refused,
    assert_refused,
    edit_config,
    edit_tensors,
    interrupted,
    outcome,
    save,
    some_of,
    summary,
)
from peft import PeftModel

from peft_lotra import LoTRAConfig, hotswap_adapter


HEAD = "base_model.model.head.weight"


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "adapter", modules_to_save=["head"])


def of_head(change):
    return lambda tensors: tensors.update({HEAD: change(tensors[HEAD])})


HEADS = {
    "wrong shape": lambda head: torch.zeros(5, 7),
    "NaN": lambda head: head * float("nan"),
    "infinite": lambda head: head * float("inf"),
    "int8": lambda head: (head * 100).to(torch.int8),
    "bool": lambda head: head > 0,
    "fp8": lambda head: head.to(torch.float8_e4m3fn),
    "complex": lambda head: torch.complex(head, head),
}


@pytest.mark.parametrize("kind", HEADS)
def test_modules_to_save(folder, kind):
    edit_tensors(folder, of_head(HEADS[kind]))
    assert_load_refused(folder, match="head.weight")


@pytest.mark.parametrize("kind", HEADS)
def test_modules_to_save_into_an_adapter_that_exists(folder, kind):
    """Loading by the name of an adapter that is there reads the tensors by another way."""
    model = adapted(modules_to_save=["head"])
    edit_tensors(folder, of_head(HEADS[kind]))
    assert_refused(lambda: model.load_adapter(folder, "default"), model, match="head.weight")


@pytest.mark.parametrize("name", [HEAD, "base_model.model.kan.layers.0.lotra_core"])
@pytest.mark.parametrize("record", [True, False])
def test_a_missing_tensor(folder, name, record):
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    if not record:
        edit_config(folder, base_layers=None, base_digest=None)
    assert_load_refused(folder, match="missing" if name == HEAD or not record else "nothing")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_dangling_link(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "nowhere")
    assert_load_refused(folder)


@pytest.mark.parametrize(
    "task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM", "NONE", 7]
)
def test_a_task_type_of_the_file(folder, task):
    edit_config(folder, task_type=task)
    bare = Net()
    error, wrong = outcome(lambda: PeftModel.from_pretrained(bare, folder), bare)
    assert not wrong
    assert error is None or isinstance(error, CLEAR), repr(error)
    if error is None:  # then it must be of use
        bare = PeftModel.from_pretrained(Net(), folder)
        assert torch.equal(bare(X), PeftModel.from_pretrained(Net(), clean(folder))(X))


def clean(folder):
    edit_config(folder, task_type=None)
    return folder


def test_a_network_that_fails_once(folder, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    edit_tensors(folder, lambda tensors: tensors["base_model.model.kan.layers.0.lotra_core"].fill_(float("nan")))
    snapshot = tmp_path / "cache" / "models--user--repo" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(snapshot / name)
    refs = tmp_path / "cache" / "models--user--repo" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fails(*args, **kwargs):
        raise LocalEntryNotFoundError("the network is unreachable")

    patched = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("peft_lotra") and hasattr(module, "hf_hub_download"):
            monkeypatch.setattr(module, "hf_hub_download", fails)
            patched += 1
            if hasattr(module, "file_exists"):
                monkeypatch.setattr(module, "file_exists", lambda *args, **kwargs: False)
    assert patched
    bare = Net()
    assert_refused(
        lambda: PeftModel.from_pretrained(bare, "user/repo", cache_dir=str(tmp_path / "cache")),
        bare,
        match="unreachable",
    )


####################################
# Ctrl-C at every line             #
####################################


def start(merged=False):
    torch.manual_seed(3)
    model = adapted(modules_to_save=["head"])
    model.add_adapter("second", LoTRAConfig(r=1, init_weights=False))
    if merged:
        model.merge_adapter(["default"])
    torch.manual_seed(4)
    return model


OPERATIONS = {
    "load": lambda model, folder: model.load_adapter(folder, "other"),
    "add": lambda model, folder: model.add_adapter("other", LoTRAConfig(r=3, init_weights=False)),
    "merge": lambda model, folder: model.merge_adapter(["default"]),
    "unmerge": lambda model, folder: model.unmerge_adapter(),
    "hotswap": lambda model, folder: hotswap_adapter(model, folder),
    "delete": lambda model, folder: model.delete_adapter("second"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_ctrl_c(tmp_path, name):
    folder = save(tmp_path / "a", modules_to_save=["head"])
    operation, merged = OPERATIONS[name], name == "unmerge"
    operation(start(merged), folder)  # fills caches
    model = start(merged)
    before = summary(model)
    lines = interrupted(lambda: operation(model, folder), at=0)
    after = summary(model)
    assert before != after and lines > 20
    wrong = []
    for at in some_of(lines):
        model = start(merged)
        with suppress(KeyboardInterrupt):
            interrupted(lambda model=model: operation(model, folder), at)
        state = summary(model)
        if state not in (before, after):
            wrong.append((at, [key for key in state if state[key] != before[key]]))
    assert not wrong, f"{len(wrong)} of {len(some_of(lines))}, of {lines} lines: {wrong[:3]}"


def test_ctrl_c_while_a_bare_model_is_adapted(tmp_path):
    folder = save(tmp_path / "a", modules_to_save=["head"])
    PeftModel.from_pretrained(Net(), folder)  # fills caches
    lines = interrupted(lambda: PeftModel.from_pretrained(Net(), folder), at=0)
    wrong = []
    for at in some_of(lines):
        model = Net()
        before = summary(model)
        try:
            interrupted(lambda model=model: PeftModel.from_pretrained(model, folder), at)
        except KeyboardInterrupt as error:
            # what PEFT does with the loaded model, by itself, is not undone
            in_eval = any(frame.name == "eval" for frame in traceback.extract_tb(error.__traceback__))
            if not in_eval and summary(model) != before:
                wrong.append(at)
    assert not wrong, f"{len(wrong)} of {len(some_of(lines))}, of {lines} lines: {wrong[:3]}"
