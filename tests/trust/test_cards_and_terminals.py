# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Cards that are Python, terminals that obey, links that lead elsewhere."""

from __future__ import annotations

import ast
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hostile import CONFIG, WEIGHTS, Net, X, adapted, edit_config, edit_tensors, save, time_limit
from peft import PeftModel
from typer.testing import CliRunner

from peft_lotra import LoTRAConfig, save_adapter, write_model_card
from peft_lotra.cli import app
from peft_lotra.files.format import write_atomically


##########################
# Cards                  #
##########################

NAMES = [
    'x"); import os; os.system("touch pwned"); ("',
    "x'); print(1); ('",
    'quote"',
    "back\\slash",
    "line\nbreak",
    "```",
    "{name}",
    "\u202ereversed",
]


def programs(folder):
    """The Python of a card."""
    return re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def calls_of(program):
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)}


# the name of a folder is the name of an adapter, and goes into the program
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("source", ["folder", "model"])
def test_the_name_of_a_folder(tmp_path, name, source):
    if source == "model" and "." in name:
        pytest.skip("no name of an adapter")
    folder = tmp_path / "adapter"
    model = adapted(adapter_name="plain")
    model.save_pretrained(folder)
    (folder / "plain").rename(folder / name)
    try:
        if source == "folder":
            write_model_card(None, folder)
        else:
            model = adapted(adapter_name=name)
            write_model_card(model, folder)
    except (ValueError, OSError) as error:
        assert repr(name)[1:8] in str(error) or name in str(error)
        return
    found = programs(folder)
    assert found
    for program in found:
        assert calls_of(program) <= {"PeftModel.from_pretrained", "AutoPeftModel.from_pretrained", "Net"}
        strings = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
        assert name in strings or source == "model"


# the class of the base comes from the config, and goes into the program
@pytest.mark.parametrize("field", ["base_model_class", "parent_library"])
@pytest.mark.parametrize("value", ["X\nimport os\nos.system('touch pwned')", "X; print(1)", "X`\n```\n# title"])
def test_the_class_in_the_config(tmp_path, field, value):
    folder = save(tmp_path / "adapter")
    mapping = {"base_model_class": "Net", "parent_library": "nets", field: value}
    edit_config(folder, auto_mapping=mapping, base_model_name_or_path="user/repo")
    (folder / "README.md").unlink()  # which has the code of the true class, and would be kept
    try:
        write_model_card(None, folder)
    except ValueError:
        return
    found = programs(folder)
    assert found
    for program in found:
        calls = {call for call in calls_of(program) if not call.endswith(".from_pretrained")}
        assert not calls and "pwned" not in {line.strip() for line in program.splitlines()}
        imported = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import)]
        assert all(alias.name == "peft_lotra" for node in imported for alias in node.names)


# names of tensors go into the table of the card
def test_the_names_of_layers_stay_in_their_table(tmp_path):
    folder = save(tmp_path / "adapter")
    hostile = "x`|\n\n# Title\n\n<script>alert(1)</script>"

    def rename(tensors):
        for key in [key for key in tensors if "kan.layers.0." in key]:
            tensors[key.replace("kan.layers.0", hostile)] = tensors.pop(key)

    edit_tensors(folder, rename)
    edit_config(folder, base_layers=None, base_digest=None)
    try:
        write_model_card(None, folder)
    except ValueError:
        return
    text = (folder / "README.md").read_text()
    assert "\n# Title" not in text and "\n<script>" not in text


##########################
# Terminals              #
##########################

ESCAPES = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\x08" * 20, "\u202e", "\x1b]8;;http://x\x1b\\"]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# a terminal obeys what it is sent
@pytest.mark.parametrize("escape", ESCAPES, ids=[ascii(escape)[1:9] for escape in ESCAPES])
@pytest.mark.parametrize("where", ["layer", "family", "base", "class", "adapter", "error"])
def test_inspect_prints_no_control_characters(tmp_path, escape, where):
    folder = save(tmp_path / (f"a{escape}b" if where == "adapter" else "a"))
    if where == "layer":

        def rename(tensors):
            for key in [key for key in tensors if "kan.layers.0." in key]:
                tensors[key.replace("kan.layers.0", f"kan{escape}x")] = tensors.pop(key)

        edit_tensors(folder, rename)
        edit_config(folder, base_layers=None, base_digest=None)
    elif where == "family":
        layers = json.loads((folder / CONFIG).read_text())["base_layers"]
        edit_config(
            folder,
            base_layers={name: {**layer, "family": f"own{escape}"} for name, layer in layers.items()},
            base_digest=None,
        )
    elif where == "base":
        edit_config(folder, base_model_name_or_path=f"user/re{escape}po")
    elif where == "class":
        edit_config(folder, auto_mapping={"base_model_class": f"Net{escape}", "parent_library": "nets"})
    elif where == "error":
        edit_config(folder, alpha=f"text{escape}")
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == (1 if where == "error" else 0)
    assert not CONTROL.search(result.output), ascii(CONTROL.findall(result.output))


# rich reads [bold], and raises on a [/x] that closes nothing
@pytest.mark.parametrize("markup", ["[bold]b[/bold]", "[/x]", "[link=x]y", ":smile:"])
@pytest.mark.parametrize("where", ["layer", "base", "adapter", "class"])
def test_names_are_no_markup(tmp_path, markup, where):
    name = f"a{markup.replace('/', '') if where == 'adapter' else markup}b"
    folder = save(tmp_path / (name if where == "adapter" else "a"))
    if where == "layer":

        def rename(tensors):
            for key in [key for key in tensors if "kan.layers.0." in key]:
                tensors[key.replace("kan.layers.0", name)] = tensors.pop(key)

        edit_tensors(folder, rename)
        edit_config(folder, base_layers=None, base_digest=None)
    elif where == "base":
        edit_config(folder, base_model_name_or_path=f"user/{name}")
    elif where == "class":
        edit_config(folder, auto_mapping={"base_model_class": name, "parent_library": "nets"})
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0 and name in result.output.replace("\n", "")


# Path("") is ".", which has the adapters of the current folder
@pytest.mark.parametrize("argument", ["", " "])
def test_inspect_of_nothing(tmp_path, argument, monkeypatch):
    monkeypatch.chdir(save(tmp_path / "a"))
    result = CliRunner().invoke(app, ["inspect", argument])
    assert result.exit_code in (1, 2) and "kan.layers" not in result.output


# an empty name is not the same as none
def test_inspect_of_no_subfolder(tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(save(tmp_path / "a")), "--subfolder", ""])
    assert result.exit_code in (1, 2) and "kan.layers" not in result.output


@pytest.mark.parametrize("argument", [["--tag", " "], ["--metric", "=3"], ["--metric", " =3"]])
def test_a_card_with_entries_without_a_name(tmp_path, argument):
    folder = save(tmp_path / "a")
    before = (folder / "README.md").read_text()
    result = CliRunner().invoke(app, ["card", str(folder), *argument])
    assert result.exit_code == 2 and (folder / "README.md").read_text() == before


@pytest.mark.parametrize("name", ["raises", "takes", "number", "nothing"])
def test_a_factory_that_builds_nothing(tmp_path, monkeypatch, name):
    lines = ["def raises(): return {}['key']", "def takes(x): return x", "number = 3", "def nothing(): return None"]
    (tmp_path / f"nets_that_{name}.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["find", f"nets_that_{name}:{name}"])
    assert result.exit_code == 1 and f"error: The factory nets_that_{name}:{name} r" in result.output


##########################
# Links                  #
##########################


def save_config(model, folder):
    model.peft_config["default"].save_pretrained(folder)


def save_all(model, folder):
    save_adapter(model, folder)


def save_peft(model, folder):
    model.save_pretrained(folder)


def save_card(model, folder):
    write_model_card(model, folder)


# open(path, "w") would follow the link
@pytest.mark.parametrize("write", [save_config, save_all, save_peft, save_card])
@pytest.mark.parametrize("name", [f"{CONFIG}.tmp", ".README.md.new", "README.md.tmp", f".{CONFIG}.next", ".saving"])
def test_a_link_in_the_place_of_a_temporary_file(tmp_path, write, name):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    model, folder = adapted(), tmp_path / "a"
    model.save_pretrained(folder)
    (folder / name).symlink_to(precious)
    try:
        write(model, folder)
    except (ValueError, OSError):
        pass
    assert precious.read_text() == "precious" and not precious.is_symlink()


# rmtree with ignore_errors leaves the link
def test_a_link_in_the_place_of_the_stage(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "a"
    elsewhere.mkdir()
    (elsewhere / WEIGHTS).write_text("precious")
    model = adapted()
    model.save_pretrained(folder)
    (folder / ".saving").symlink_to(elsewhere)
    try:
        save_adapter(model, folder)
    except (ValueError, OSError):
        pass
    assert (elsewhere / WEIGHTS).read_text() == "precious" and os.listdir(elsewhere) == [WEIGHTS]


# a link as the target is replaced, not followed
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "README.md"])
@pytest.mark.parametrize("save", [save_all, save_peft])
@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("adapter", ["default", "second"])
def test_a_link_in_the_place_of_a_file(tmp_path, name, save, link, adapter):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "a" if adapter == "default" else tmp_path / "a" / adapter
    folder.mkdir(parents=True)
    getattr(folder / name, link)(precious)
    save(adapted(adapter_name=adapter), tmp_path / "a")
    assert precious.read_text() == "precious"
    assert LoTRAConfig.from_pretrained(folder).r == 2
    assert name != "README.md" or "\nprecious\n" in (folder / name).read_text() or adapter == "second"


@pytest.mark.parametrize("save", [save_all, save_peft])
@pytest.mark.parametrize("kind", ["dangling", "pipe", "endless"])
def test_a_card_that_is_no_file(tmp_path, save, kind):
    folder = tmp_path / "a"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / "README.md")
    else:
        (folder / "README.md").symlink_to("/dev/zero" if kind == "endless" else tmp_path / "nowhere")
    with time_limit(5):
        save(adapted(), folder)
    assert "LoTRA" in (folder / "README.md").read_text() and os.listdir(tmp_path) == ["a"]


def test_temporary_files_are_created_exclusively(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "a.guessed.tmp").symlink_to(precious)
    monkeypatch.setattr("peft_lotra.files.format.secrets.token_hex", lambda _: "guessed")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", "new")
    assert precious.read_text() == "precious" and set(os.listdir(tmp_path)) == {"precious", "a.guessed.tmp"}


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr("peft_lotra.files.format.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


UNREADABLE = [b"\xff\xfe\0bad", b"---\ntags: [x\nfoo: : :\n---\nmine", b"---\n3\n---\n"]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(3))
@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter])
def test_a_card_that_cannot_be_read(tmp_path, save, content):
    """It was a raw error, and nothing was saved."""
    (tmp_path / "README.md").write_bytes(content)
    model = adapted()
    with pytest.warns(UserWarning, match="The adapter is saved, its model card is not written"):
        save(model, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))
    assert (tmp_path / "README.md").read_bytes() == content


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter])
def test_a_folder_in_the_place_of_a_file_to_write(tmp_path, save, name):
    """The other files were written, or half exchanged, before the error."""
    model = adapted()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != name}
    (tmp_path / name).unlink()
    (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name} is a folder, where a file is to be written"):
        save(adapted(alpha=2.0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_several_save_into_one_folder(tmp_path):
    """Each removed the files that another one was writing."""
    models = [adapted(alpha=float(alpha)) for alpha in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(save_adapter, model, tmp_path) for model in models * 3]:
            done.result()
    y = PeftModel.from_pretrained(Net(), tmp_path)(X)
    assert any(torch.equal(y, model(X)) for model in models)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_save_that_never_ends(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("peft_lotra.files.format.WAIT_SECONDS", 0)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="Another save into"):
        save_adapter(adapted(), tmp_path)
    os.close(handle)
    save_adapter(adapted(), tmp_path)
