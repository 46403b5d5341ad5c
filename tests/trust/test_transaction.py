# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A change is a transaction: what fails, or is interrupted, leaves everything as it was.

Interruptions are tried at a sample of the lines. At all of them, half an hour on one core:
LOTRA_ALL_LINES=1 python -m pytest tests/trust/test_transaction.py -k ctrl_c
"""

from __future__ import annotations

import inspect
import sys
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
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import integrations
from torch import nn

from peft_lotra import LoTRAConfig, enable_mixed, hotswap_adapter


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
    for name in ("first", "second"):
        model.add_adapter(name, LoTRAConfig(r=1, init_weights=False))
    if merged:
        model.merge_adapter(["default"])
    torch.manual_seed(4)
    return model


OPERATIONS = {
    "load": lambda model, folder: model.load_adapter(folder, "other"),
    "load to train": lambda model, folder: model.load_adapter(
        folder, "other", is_trainable=True, low_cpu_mem_usage=True
    ),
    # an adapter that is there, whose tensors are written in place
    "load over": lambda model, folder: model.load_adapter(folder, "default"),
    "add": lambda model, folder: model.add_adapter("other", LoTRAConfig(r=3, init_weights=False)),
    "sum": lambda model, folder: model.add_weighted_adapter(["first", "second"], [1.0, 2.0], "sum"),
    "merge": lambda model, folder: model.merge_adapter(["default"]),
    "unmerge": lambda model, folder: model.unmerge_adapter(),
    "hotswap": lambda model, folder: hotswap_adapter(model, folder),
    "delete": lambda model, folder: model.delete_adapter("second"),
    "delete the active one": lambda model, folder: model.delete_adapter("default"),
    "set": lambda model, folder: model.set_adapter("second"),
    "set while merged": lambda model, folder: model.set_adapter("second"),
    "disable": lambda model, folder: model.base_model.disable_adapter_layers(),
    "merge and unload": lambda model, folder: model.merge_and_unload(),
    "unload": lambda model, folder: model.unload(),
    "unload while merged": lambda model, folder: model.unload(),
}


def interrupt_everywhere(start, operation):
    """The states that interruptions leave behind which are neither the one before nor the one after."""
    operation(start())  # fills caches
    model = start()
    before = summary(model)
    lines = interrupted(lambda: operation(model), at=0)
    after = summary(model)
    assert before != after and lines > 20
    wrong = []
    for at in some_of(lines):
        model = start()
        with suppress(KeyboardInterrupt):
            interrupted(lambda model=model: operation(model), at)
        state = summary(model)
        if state not in (before, after):
            wrong.append((at, [key for key in state if state[key] != before[key]]))
    assert not wrong, f"{len(wrong)} of {len(some_of(lines))}, of {lines} lines: {wrong[:3]}"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_ctrl_c(tmp_path, name):
    folder = save(tmp_path / "a", modules_to_save=["head"])
    merged = "unmerge" in name or "while merged" in name
    interrupt_everywhere(lambda: start(merged), lambda model: OPERATIONS[name](model, folder))


def test_ctrl_c_where_peft_puts_torch_back(tmp_path):
    folder = save(tmp_path / "a")
    code = integrations._init_on_device.__wrapped__.__code__
    lines, first = inspect.getsourcelines(code)
    at = first + lines.index("        nn.Module.register_parameter = old_register_parameter\n")

    def trace(frame, event, argument):
        if frame.f_code is code and event == "line" and frame.f_lineno == at:
            raise KeyboardInterrupt
        return trace

    model = adapted()
    before = summary(model)
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.load_adapter(folder, "other", low_cpu_mem_usage=True)
    finally:
        sys.settrace(None)
    assert summary(model) == before
    assert not nn.Linear(2, 2).weight.is_meta


CREATIONS = {
    "load": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "load with a config": lambda model, folder: PeftModel.from_pretrained(
        model, folder, config=LoTRAConfig.from_pretrained(folder)
    ),
    "get_peft_model": lambda model, folder: get_peft_model(model, LoTRAConfig(r=2, modules_to_save=["head"])),
    "inject": lambda model, folder: inject_adapter_in_model(LoTRAConfig(r=2, init_weights=False), model),
}


@pytest.mark.parametrize("name", CREATIONS)
def test_ctrl_c_while_a_bare_model_is_adapted(tmp_path, name):
    folder = save(tmp_path / "a", modules_to_save=["head"])

    def create(model):
        torch.manual_seed(4)
        CREATIONS[name](model, folder)

    interrupt_everywhere(Net, create)


MIXED = {
    "load": lambda model, folder: model.load_adapter(folder, "other"),
    "add": lambda model, folder: model.add_adapter("other", LoraConfig(target_modules=["head"])),
    "set": lambda model, folder: model.set_adapter(["second"]),
    "delete": lambda model, folder: model.delete_adapter("second"),
    "merge": lambda model, folder: model.merge_adapter(),
    "merge and unload": lambda model, folder: model.merge_and_unload(),
    "unload": lambda model, folder: model.unload(),
}


def start_mixed():
    torch.manual_seed(3)
    model = get_peft_model(Net(), LoTRAConfig(r=2, init_weights=False), mixed=True)
    model.add_adapter("second", LoraConfig(target_modules=["head"], init_lora_weights=False))
    model.set_adapter(["default", "second"])
    torch.manual_seed(4)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MIXED)
def test_ctrl_c_in_a_mixed_model(tmp_path, name):
    enable_mixed()
    folder = save(tmp_path / "a")
    interrupt_everywhere(start_mixed, lambda model: MIXED[name](model, folder))


def test_a_config_is_as_before_a_failure():
    config, base = LoTRAConfig(r=2, init_weights="gradient"), Net()
    before = dict(vars(config))
    with pytest.raises(ValueError):  # no gradient was gathered
        get_peft_model(base, config)
    assert vars(config) == before


def test_set_adapter_that_fails(tmp_path):
    """The model and its tuner agree on the active adapter after an error, too."""
    model = start(merged=True)
    with torch.no_grad():
        model.base_model.model.kan.layers[0].base_layer.update_grid(torch.rand(50, 3))
    before = summary(model)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="grid"):
        model.set_adapter("second")
    assert summary(model) == before
