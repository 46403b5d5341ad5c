# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Saves that are killed, that fail, and that run at the same time: the files in the folder are the old or the new."""

import json
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import X, adapt, net, run_python
from huggingface_hub import create_repo, upload_folder
from peft import PeftModel

from peft_lotra import AdapterBank, LoTRAConfig, ParametricAdapter, save_adapter
from peft_lotra.kan import KAN
from peft_lotra.modules.folders import replacing_files


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX has them")


@cache
def make_adapter(rank):
    return adapt(r=rank)


@cache
def make_named_adapter(rank):
    model = adapt()
    model.add_adapter("other", LoTRAConfig(r=rank))
    return model


@cache
def make_bank(adapters, rank=2):
    bank = AdapterBank(net())
    for number in range(adapters):
        bank.add(f"customer {number}", LoTRAConfig(r=rank))
    return bank


@cache
def make_family(members):
    """A family whose members all equal the base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = KAN([1, 3, 1])
    family = ParametricAdapter(base, loss_of=lambda model, c: 0.0, ranks=2)
    family.fit(range(1, members + 1), train=lambda model, c: None, progress=False)
    return family


def load_rank(folder):
    model = PeftModel.from_pretrained(net(), folder)
    model(X)
    return model.peft_config["default"].r


def count_members(folder):
    return len(ParametricAdapter.from_pretrained(KAN([1, 3, 1]), folder, check_base="ignore").parameters)


def load_first_rank(folder):
    return int(LoTRAConfig.from_pretrained(str(folder)).r[0])


class Kind(NamedTuple):
    """Saves that differ by a number, the rank or a count, which tells old files from new ones."""

    files: list[str]
    save: Callable[[int, Path], Any]
    load: Callable[[Path], int]


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
KINDS = {
    # tensors of one rank and the configuration of another do not fit
    "adapter": Kind(FILES, lambda number, folder: save_adapter(make_adapter(number), folder), load_rank),
    # in a subfolder, as PEFT saves adapters that are not called default
    "named adapter": Kind(
        ["README.md", "other"],
        lambda number, folder: save_adapter(make_named_adapter(number), folder, selected_adapters=["other"]),
        lambda folder: load_rank(Path(folder, "other")),
    ),
    "family": Kind(
        ["README.md", "parametric_adapter.safetensors"],
        lambda number, folder: make_family(number).save_pretrained(folder),
        count_members,
    ),
    "bank": Kind(
        ["adapter_bank.safetensors"],
        lambda number, folder: make_bank(number).save(folder),
        lambda folder: len(AdapterBank.load(net(), folder)),
    ),
    "export of a bank": Kind(
        FILES[1:], lambda number, folder: make_bank(1, number).export("customer 0", folder), load_first_rank
    ),
}

SCRIPT = """
import json, os, resource, signal, torch, warnings
from pathlib import Path
from peft_lotra.modules.folders import replacing_files
from test_interrupted_saves import KINDS
torch.set_num_threads(1)  # or processes could not be forked

def start_save(kind, folder, calls):
    # in a process that kills itself at the given call that makes, writes, moves or removes a file
    process = os.fork()
    if process:
        return os.WEXITSTATUS(os.waitpid(process, 0)[1]) == 7
    left = [calls]
    for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir"):
        def wrapped(*args, call=getattr(os, name), **kwargs):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **kwargs)
        setattr(os, name, wrapped)
    kind.save(3, folder)
    os._exit(7)

def fail_to_save(kind, folder):
    # the error where files may have 1,000 bytes at most
    message = None
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        kind.save(3, folder)
    except Exception as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return message

def kill_saves(kind, folder):
    kind.save(2, folder)
    loaded, again, calls, ended = [], [], 0, False
    while not ended:
        ended = start_save(kind, folder, calls)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.append(kind.load(folder))
            fail_to_save(kind, folder)
            again.append(kind.load(folder))
        kind.save(2, folder)
        calls += 1
    return {"loaded": loaded, "again": again, "last": kind.load(folder), "files": sorted(os.listdir(folder))}

def fill_disk(kind, folder):
    read_all = lambda: {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    before = read_all()
    errors = [fail_to_save(kind, place) for place in (folder, f"new {folder}")]
    errors = [error for error in errors if error is not None]
    is_same = before == read_all() and kind.files == sorted(os.listdir(folder))
    return {"errors": errors, "is_same": is_same, "is_new": os.path.exists(f"new {folder}")}

def save_at_once(folder):
    child = os.fork()
    for number in range(30):
        with replacing_files(folder) as stage:
            for name in ("first", "second"):
                Path(stage, name).write_text(f"{os.getpid()} {number}")
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    files = sorted(os.listdir(folder))
    return {"files": files, "contents": [Path(folder, name).read_text() for name in files]}

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
outcomes = {"at once": save_at_once("at once")}
for name, kind in KINDS.items():
    outcomes[name] = {"killed": kill_saves(kind, name), "full": fill_disk(kind, name)}
print(json.dumps(outcomes))
"""
HERE = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return json.loads(run_python(HERE + SCRIPT, tmp_path_factory.mktemp("saves")).splitlines()[-1])


@needs_fork
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_save_leaves_the_old_or_the_new_and_the_next_save_cleans_up(outcomes, name):
    """Killed before each call that makes, writes, moves or removes a file; also if the save after it fails."""
    killed = outcomes[name]["killed"]

    assert set(killed["loaded"]) == {2, 3}
    assert killed["loaded"] == sorted(killed["loaded"])
    # what a killed save has left is finished by the next one, even if that fails
    for before, after in zip(killed["loaded"], killed["again"], strict=True):
        assert after in {before, 3}
    assert killed["last"] == 2
    assert killed["files"] == KINDS[name].files


@needs_fork
@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_changes_nothing(outcomes, name):
    full = outcomes[name]["full"]

    assert len(full["errors"]) == 2
    assert full["is_same"]
    assert not full["is_new"]


def test_a_save_that_begins_during_another_waits_for_it(tmp_path, monkeypatch):
    """Otherwise the configuration of the first would follow the tensors of the second."""
    second = threading.Thread(target=save_adapter, args=(adapt(r=2), tmp_path))
    replace = os.replace

    def replace_late(source, target):
        if target.endswith("adapter_config.json") and second.ident is None:
            second.start()
            second.join(timeout=3)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    save_adapter(adapt(r=1), tmp_path)
    second.join()

    assert load_rank(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == FILES


@needs_fork
def test_saves_of_several_processes_into_one_folder_are_whole(outcomes):
    assert outcomes["at once"]["files"] == ["first", "second"]
    first, second = outcomes["at once"]["contents"]
    assert first == second
    assert first.endswith(" 29")


def test_a_folder_that_another_save_removes_is_made_again(tmp_path, monkeypatch):
    """A save that ends removes the folder of the lock just after the next one found that it exists."""
    mkdir, removed = os.mkdir, []

    def find_then_lose(path, *args):
        if Path(path).name == "peft_lotra" and not removed:
            removed.append(path)
            raise FileExistsError(path)
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", find_then_lose)
    with replacing_files(tmp_path) as stage:
        (Path(stage) / "file").write_text("new")

    assert removed
    assert (tmp_path / "file").read_text() == "new"


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")

    with pytest.raises(NotADirectoryError):
        KINDS["family"].save(2, path)

    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def interrupt_save(model, folder):
    """Saves an adapter, and interrupts it when the tensors are moved and the configuration is not."""
    replace = os.replace

    def interrupted(source, target):
        if target.endswith("adapter_config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        save_adapter(model, folder)


def test_a_plain_save_after_an_interrupted_one_counts(tmp_path):
    """What an interrupted save left does not take the place of what PEFT saved later."""
    save_adapter(adapt(r=1), tmp_path)
    interrupt_save(adapt(r=2), tmp_path)
    between = load_rank(tmp_path)

    adapt(r=3).save_pretrained(tmp_path)

    assert between == 2
    assert load_rank(tmp_path) == 3


def test_leftovers_are_not_uploaded(hub, tmp_path):
    """`hf upload` passes over the folder in which files are written."""
    interrupt_save(adapt(), tmp_path)
    assert list(tmp_path.rglob("adapter_config.json"))

    create_repo("user/adapter")
    upload_folder(repo_id="user/adapter", folder_path=tmp_path)

    assert sorted(hub.repos["user/adapter"].files("main")) == [".gitattributes", "adapter_model.safetensors"]


def test_stages_are_removed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing_files(tmp_path / "new") as stage:
        Path(stage, "file").write_text("half")
        raise ZeroDivisionError

    assert not os.listdir(tmp_path)
