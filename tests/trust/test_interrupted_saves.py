# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Saves that are killed, that fail, and that run at the same time: the files in the folder are the old or the new."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from behaving import X, adapted, net, python
from peft import PeftModel

from peft_lotra import LoTRAConfig, ParametricAdapter, save_adapter
from peft_lotra.kan import KAN
from peft_lotra.modules.folders import replacing_files


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX has them")


def make_family(members: int) -> ParametricAdapter:
    """A family whose members all equal the base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = KAN([1, 3, 1])
    family = ParametricAdapter(base, loss_of=lambda model, c: 0.0, ranks=2)
    family.fit(range(1, members + 1), train=lambda model, c: None, progress=False)
    return family


class Adapters:
    """Adapters of other ranks: tensors of one and the configuration of another do not fit."""

    FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    @staticmethod
    def save(number: int, folder: Path) -> None:
        save_adapter(adapted(r=number), folder)

    @staticmethod
    def load(folder: Path) -> int:
        model = PeftModel.from_pretrained(net(), folder)
        model(X)
        return model.peft_config["default"].r


class NamedAdapters(Adapters):
    """The same in a subfolder, as PEFT saves adapters that are not called default."""

    FILES = ["README.md", "other"]

    @staticmethod
    def save(number: int, folder: Path) -> None:
        model = adapted()
        model.add_adapter("other", LoTRAConfig(r=number))
        save_adapter(model, folder, selected_adapters=["other"])

    @staticmethod
    def load(folder: Path) -> int:
        return Adapters.load(Path(folder, "other"))


class Families:
    """Families of other numbers of members."""

    FILES = ["README.md", "parametric_adapter.safetensors"]

    @staticmethod
    def save(number: int, folder: Path) -> None:
        make_family(number).save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> int:
        return len(ParametricAdapter.from_pretrained(KAN([1, 3, 1]), folder, check_base="ignore").parameters)


KINDS = {"adapter": Adapters, "named adapter": NamedAdapters, "family": Families}

KILLED = """
import json, os, sys, time, torch, warnings
torch.set_num_threads(1)  # or processes could not be forked
import test_interrupted_saves as tests
kind = tests.KINDS[sys.argv[1]]

def start_save(number, calls):
    # in a process that kills itself at the given call that writes or moves a file
    process = os.fork()
    if process:
        return os.WEXITSTATUS(os.waitpid(process, 0)[1]) == 7
    left = [calls]
    for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
        def wrapped(*args, call=getattr(os, name), **kwargs):
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return call(*args, **kwargs)
        setattr(os, name, wrapped)
    kind.save(number, "folder")
    os._exit(7)

kind.save(2, "folder")
warnings.simplefilter("error")
found, calls, ended = [], 0, False
while not ended:
    ended = start_save(3, calls)
    found.append(kind.load("folder"))
    kind.save(2, "folder")
    calls += 1
print(json.dumps({"found": found, "last": kind.load("folder"), "files": sorted(os.listdir("folder"))}))
"""


@needs_fork
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_save_leaves_the_old_or_the_new_and_the_next_save_cleans_up(name, tmp_path):
    script = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nsys.argv = ['', {name!r}]\n" + KILLED

    result = json.loads(python(script, tmp_path).splitlines()[-1])

    numbers = result["found"]
    assert set(numbers) == {2, 3} and numbers == sorted(numbers)
    assert result["last"] == 2 and result["files"] == KINDS[name].FILES


FULL_DISK = """
import json, os, resource, signal, sys
import test_interrupted_saves as tests
from pathlib import Path
kind = tests.KINDS[sys.argv[1]]

def read_all():
    return {str(path): path.read_bytes() for path in Path("folder").rglob("*") if path.is_file()}

kind.save(2, "folder")
before = read_all()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
errors = []
for folder in ("folder", "new"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        kind.save(3, folder)
    except Exception as error:
        errors.append(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([len(errors), before == read_all(), sorted(os.listdir("folder")), os.path.exists("new")]))
"""


@needs_fork
@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_changes_nothing(name, tmp_path):
    """Files may have 1,000 bytes at most, which stands for a disk without room."""
    script = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nsys.argv = ['', {name!r}]\n" + FULL_DISK

    errors, unchanged, files, new_folder = json.loads(python(script, tmp_path).splitlines()[-1])

    assert errors == 2 and unchanged and files == KINDS[name].FILES and not new_folder


@pytest.mark.parametrize("name", KINDS)
def test_saves_of_several_threads_into_one_folder_are_whole(name, tmp_path):
    kind, errors = KINDS[name], []

    def save_often(number: int) -> None:
        try:
            for _ in range(4):
                kind.save(number, tmp_path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save_often, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert kind.load(tmp_path) in (1, 2, 3)
    assert sorted(os.listdir(tmp_path)) == kind.FILES


AT_ONCE = """
import os, sys
from peft_lotra.modules.folders import replacing_files
for number in range(30):
    with replacing_files("folder") as stage:
        for name in ("first", "second"):
            with open(os.path.join(stage, name), "w") as file:
                file.write(f"{os.getpid()} {number}")
"""


@needs_fork
def test_saves_of_several_processes_into_one_folder_are_whole(tmp_path):
    children = "import os\nfor _ in range(2):\n    os.fork()\n" + AT_ONCE + "\nwhile True:\n"
    children += "    try:\n        assert os.wait()[1] == 0\n    except ChildProcessError:\n        break\n"

    python(children, tmp_path)

    first, second = ((tmp_path / "folder" / name).read_text() for name in ("first", "second"))
    assert first == second and first.endswith(" 29")
    assert sorted(os.listdir(tmp_path / "folder")) == ["first", "second"]


@pytest.mark.parametrize("name", KINDS)
def test_other_files_and_a_symlink_stay(name, tmp_path):
    folder, link, kind = tmp_path / "folder", tmp_path / "link", KINDS[name]
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    link.symlink_to(folder, target_is_directory=True)

    kind.save(2, link)

    assert link.is_symlink() and kind.load(folder) == 2
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(folder)) == sorted([*kind.FILES, "notes.txt"])


@pytest.mark.parametrize("name", KINDS)
def test_a_file_in_place_of_a_folder_is_refused(name, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")

    with pytest.raises(ValueError, match="`folder` is .*, which is a file"):
        KINDS[name].save(2, path)

    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def interrupt_save(model: PeftModel, folder: Path) -> None:
    """Saves an adapter, and interrupts it when the tensors are moved and the configuration is not."""
    replace = os.replace

    def interrupted(source: str, target: str) -> None:
        if target.endswith("adapter_config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        save_adapter(model, folder)


def test_a_plain_save_after_an_interrupted_one_counts(tmp_path):
    """What an interrupted save left does not take the place of what PEFT saved later."""
    save_adapter(adapted(r=1), tmp_path)
    interrupt_save(adapted(r=2), tmp_path)
    between = Adapters.load(tmp_path)

    adapted(r=3).save_pretrained(tmp_path)

    assert between == 2 and Adapters.load(tmp_path) == 3


UPLOAD = """
from hub_server import start_hub
hub = start_hub("user")
from pathlib import Path
from behaving import adapted
from huggingface_hub import HfApi
from test_interrupted_saves import interrupt_save
folder = Path("folder")
interrupt_save(adapted(), folder)
assert list(folder.rglob("adapter_config.json"))
HfApi().create_repo("user/adapter")
HfApi().upload_folder(repo_id="user/adapter", folder_path=folder)
print(*sorted(hub.repos["user/adapter"].files("main")))
"""


def test_leftovers_are_not_uploaded(tmp_path):
    """`hf upload` passes over the folder in which files are written."""
    script = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n" + UPLOAD

    files = python(script, tmp_path).splitlines()[-1]

    assert files == ".gitattributes adapter_model.safetensors"


def test_stages_are_removed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing_files(tmp_path / "new") as stage:
        Path(stage, "file").write_text("half")
        raise ZeroDivisionError

    assert not os.listdir(tmp_path)
