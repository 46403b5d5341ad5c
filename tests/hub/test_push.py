# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pushes to a stand-in for the Hub, and loads by other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub, HubServer
from huggingface_hub import ModelCard

import peft_lotra


WORKER = Path(__file__).parents[1] / "support" / "hub_worker.py"


@pytest.fixture(scope="module")
def hub() -> Hub:
    return Hub({"hf_ann": "ann", "hf_user": "user"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


def client(step: str, hub: Hub, folder: Path, token: str = "hf_ann") -> dict:
    """Runs a step of the worker in a process of its own, with an empty cache."""
    with HubServer(hub) as server:
        env = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HOME": str(folder / f"cache-{step}")}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(peft_lotra.__file__).parents[1])
        command = [sys.executable, str(WORKER), step, str(folder)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / f"{step}.json").read_text())


@pytest.fixture(scope="module")
def pushed(hub, folder) -> dict:
    return client("push", hub, folder)


@pytest.fixture(scope="module")
def pulled(hub, folder, pushed) -> dict:
    return client("pull", hub, folder)


def card(hub: Hub, repo: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo].files(revision)["README.md"].content.decode())


@pytest.mark.parametrize("what", ["public", "v2", "private", "named", "several", "other", "plain", "folder", "kept"])
def test_another_process_loads_the_same(pushed, pulled, what):
    assert pulled["outputs"][what] == pushed["outputs"][what]
    same = [name for name, output in pushed["outputs"].items() if output == pushed["outputs"][what]]
    assert len(same) == 1 or {*same} == {"public", "folder", "kept"}


def test_files_and_commits(hub, pushed):
    repo = hub.repos["ann/public"]
    files = repo.files("main")
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert [message for message, _ in repo.commits.values()][:2] == ["initial commit", "first"]
    assert pushed["again"] == repo.refs["main"] and set(repo.refs) == {"main", "v2", "refs/pr/1"}
    assert pushed["pull request"].endswith("/ann/public/discussions/1")
    assert {name for name, it in hub.repos.items() if it.private} == {"ann/private"}
    both = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.repos["ann/one"].files("main")) - {".gitattributes"} == {"README.md", *(f"other/{f}" for f in both)}
    assert set(hub.repos["ann/folder"].files("main")) - {".gitattributes"} == {"README.md", *both}


def test_no_folder_of_this_machine_is_named(hub, pushed, folder):
    for file in ("README.md", "adapter_config.json"):
        assert str(folder).encode() not in hub.repos["ann/here"].files("main")[file].content
    assert card(hub, "ann/here").data.base_model is None


def test_the_card(hub, pushed):
    found = card(hub, "ann/public")
    assert found.data.library_name == "peft" and found.data.base_model == "ann/kan"
    assert {"base_model:adapter:ann/kan", "digits", "kan", "lotra", "peft-plugin"} <= set(found.data.tags)
    assert found.data.eval_results[0].metric_value == 0.9 and "| r2 | 0.9 | Unknown |" in found.text
    assert "| `layers.0` | peft-lotra | (8, 3, 9) | (2, 2, 2) | 1 |" in found.text.replace("`kan.", "`")
    assert 'revision="v2"' in card(hub, "ann/public", "v2").text


def test_the_text_of_a_person_is_kept(hub, pushed):
    for revision, value in (("main", 0.5), ("again", 0.25)):
        found = card(hub, "ann/kept", revision)
        assert found.text.startswith("\n# My adapter\n\nIt reads scans.\n") and found.text.count("## Use it") == 1
        assert found.data.license == "mit" and {"mine", "lotra"} <= set(found.data.tags)
        assert found.data.eval_results[0].metric_value == value


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("public", "ValueError", "exists and is public"),
        ("foreign", "HfHubHTTPError", "403"),
        ("base_model", "HFValidationError", "/home/ann/kan"),
        ("metrics", "ValueError", "finite numbers"),
        ("selected", "ValueError", "nobody"),
        ("argument", "TypeError", "licence"),
        ("lora", "ValueError", "holds a LORA adapter"),
        ("no model", "ValueError", "expected a PeftModel or the folder of a saved adapter"),
        ("no adapter", "ValueError", "expected a PeftModel or the folder of a saved adapter"),
    ],
)
def test_a_push_that_fails_leaves_nothing(hub, pushed, what, error, message):
    kind, text = pushed["errors"][what]
    assert kind == error and message in text
    assert not {"ann/new", "bob/public"} & set(hub.repos)


def test_commands_on_the_hub(pushed, pulled):
    code, out, _ = pulled["commands"]["inspect"]
    assert code == 0 and json.loads(out)["base_model"] == "ann/kan"
    assert "(2, 2, 2)" in pulled["commands"]["inspect named"][1]  # the only one, though not the default
    assert pulled["commands"]["merge"][0] == 0
    torch.testing.assert_close(torch.tensor(pulled["outputs"]["merged"]), torch.tensor(pushed["outputs"]["v2"]))
    for what in ("missing", "no adapter"):
        code, out, err = pulled["commands"][what]
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_the_python_of_the_docs(tmp_path):
    found = client("docs", Hub({"hf_user": "user"}), tmp_path, "hf_user")
    assert found["pushed"] == found["pulled"]


def test_a_script_with_a_hub_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, huggingface_hub\nhuggingface_hub.create_repo(sys.argv[1])\n")
    command = [sys.executable, str(WORKER.with_name("hub_server.py")), str(script), "user/kan"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "user/kan on the stand-in for the Hub:\n    .gitattributes\n", result.stderr
