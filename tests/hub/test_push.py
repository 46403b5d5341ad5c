# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pushing and pulling for real, over HTTP, see `hub_server.py` for the server and `hub_worker.py` for the clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Blob, Hub, HubServer
from huggingface_hub import ModelCard


WORKER = Path(__file__).parents[1] / "support" / "hub_worker.py"
BROKEN = b"---\ntags: [mine\n---\n# Mine\n"


def client(step: str, folder: Path, url: str) -> dict:
    """What a process of its own found, with an empty cache."""
    home = folder / f"home-{step}"
    home.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": url, "HF_TOKEN": "hf_ann", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(WORKER.parents[2]), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(WORKER), step, str(folder)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / f"{step}.json").read_text())


@pytest.fixture(scope="module")
def hub() -> Hub:
    return Hub({"hf_ann": "ann", "hf_user": "user"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def pushed(hub, folder) -> dict:
    with HubServer(hub) as server:
        return client("push", folder, server.url)


@pytest.fixture(scope="module")
def interrupted(hub, folder, pushed) -> dict:
    """A push to a server that dies before the commit; "public" is as it was before, as far as anybody can see."""
    hub.repos["ann/broken"].commit("main", "by hand", {"README.md": Blob(BROKEN, False)})
    before = hub.repos["ann/public"].refs.copy(), set(hub.lfs)
    with HubServer(hub, dies_at="POST .*/commit/") as server:
        found = client("interrupted", folder, server.url)
    return {**found, "before": before, "after": (hub.repos["ann/public"].refs.copy(), set(hub.lfs))}


@pytest.fixture(scope="module")
def pulled(hub, folder, interrupted) -> dict:
    with HubServer(hub) as server:
        return client("pull", folder, server.url)


def card(hub: Hub, repo: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo].files(revision)["README.md"].content.decode())


class TestRoundTrip:
    @pytest.mark.parametrize(
        "what",
        [
            "kan",
            "private-kan",
            "public",
            "v2",
            "private",
            "several",
            "other",
            "named",
            "plain",
            "kept",
            "from a folder",
        ],
    )
    def test_nothing_is_lost(self, pushed, pulled, what):
        found = {k: v for k, v in pulled["outputs"].items() if k.startswith(f"{what}: ") and "extracted" not in k}
        assert found
        for how, output in found.items():
            assert output == pushed["outputs"][what] or how == "v2: merged", how

    def test_the_adapters_differ(self, pushed):
        outputs = [json.dumps(output) for name, output in pushed["outputs"].items() if not name.startswith("here")]
        # "kept" and "from a folder" hold the adapter of "public"
        assert len(set(outputs)) == len(outputs) - 2

    def test_the_snippets_were_run_as_they_stand(self, pulled):
        names = [name for name in pulled["outputs"] if "snippet" in name]
        assert {"public: snippet 0", "private: snippet 0", "v2: snippet 0", "plain: snippet 0"} <= set(names)
        # the second one is AutoPeftModel's, which needs the base on the Hub
        assert "public: snippet 1" in names and "v2: snippet 1" in names
        assert "plain: snippet 1" not in names

    def test_files_and_commits(self, hub, pushed):
        files = hub.repos["ann/public"].files(pushed["heads"]["public"])
        assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert [path for path, blob in files.items() if blob.lfs] == ["adapter_model.safetensors"]
        messages = [message for message, _ in hub.repos["ann/public"].commits.values()]
        assert messages == ["initial commit", "first", *["Upload LoTRA adapter"] * 3]
        assert pushed["again"] == pushed["heads"]["public"] == hub.repos["ann/public"].refs["main"]
        assert set(hub.repos["ann/public"].refs) == {"main", "v2", "refs/pr/1", "refs/pr/2"}
        assert pushed["pull request"].endswith("/ann/public/discussions/1")
        assert pushed["request of another"].endswith("/ann/public/discussions/2")
        assert set(hub.repos["ann/several"].files("main")) >= {"adapter_config.json", "other/adapter_config.json"}
        for path, name in (("", "default"), ("other/", "other")):
            size = len(hub.repos["ann/several"].files("main")[f"{path}adapter_model.safetensors"].content)
            assert size < 1400, name  # no tensors of the other one
        assert "optimizer.pt" not in hub.repos["ann/from-folder"].files("main")

    def test_private(self, hub, pulled):
        assert {name for name, repo in hub.repos.items() if repo.private} == {
            "ann/private",
            "ann/private-kan",
            "ann/extracted",
        }
        for who in ("anonymous", "wrong token", "missing"):
            kind, message = pulled["errors"][who]
            assert kind in ("ValueError", "RepositoryNotFoundError", "HfHubHTTPError") and message, who

    def test_auto_peft_model_asks_for_the_allowlist(self, pulled):
        kind, message = pulled["errors"]["allowlist"]
        assert kind == "ValueError" and "import allowlist" in message

    def test_an_adapter_for_another_shape_leaves_the_base_alone(self, pulled):
        kind, message = pulled["errors"]["other base"]
        assert kind == "ValueError" and "kan.layers.0" in message and pulled["base unchanged"]

    def test_no_folder_of_this_machine_is_named(self, hub, pushed, folder):
        for file in ("README.md", "adapter_config.json"):
            assert str(folder).encode() not in hub.repos["ann/here"].files("main")[file].content
        config = json.loads(hub.repos["ann/here"].files("main")["adapter_config.json"].content)
        assert config["base_model_name_or_path"] is None and card(hub, "ann/here").data.base_model is None
        config = json.loads(hub.repos["ann/based"].files("main")["adapter_config.json"].content)
        assert config["base_model_name_or_path"] == card(hub, "ann/based").data.base_model == "ann/kan"


def test_the_section_of_the_readme(pushed):
    found = pushed["readme"]
    assert found["codes"] == [0, 0, 0, 0], found["output"]
    assert found["pushed"] == found["pulled"]
    (anna, of_anna), (ben, of_ben) = found["customers"].values()
    assert anna == of_anna != ben == of_ben


class TestFailedPush:
    @pytest.mark.parametrize(
        ("what", "error", "message"),
        [
            ("not logged in", "LocalTokenNotFoundError", "hf auth login"),
            ("wrong token", "HfHubHTTPError", "does not accept the token"),
            ("foreign", "HfHubHTTPError", "may not write to bob/public"),
            ("of ann", "HfHubHTTPError", "may not write to ann/public"),
            ("lora", "ValueError", "holds a LORA adapter"),
            ("public", "ValueError", "exists and is public"),
            ("invalid base", "ValueError", "`base_model` is '/home/ann/kan'"),
            ("invalid metrics", "ValueError", "finite numbers"),
            ("request for a branch", "ValueError", "A pull request is made for the main branch"),
            ("unknown adapter", "ValueError", "nobody"),
            ("unknown adapter of a folder", "ValueError", "nobody"),
            ("no model", "ValueError", "expected a PeftModel"),
            ("other method", "ValueError", "Adapters of other methods"),
            ("no adapter", "ValueError", "is no adapter"),
            ("lora folder", "ValueError", "holds a LORA adapter"),
            ("contested", "HfHubHTTPError", "was changed during the push"),
        ],
    )
    def test_message(self, pushed, what, error, message):
        kind, text = pushed["errors"][what]
        assert kind == error and message in text

    def test_nothing_is_changed(self, hub, pushed):
        assert pushed["unchanged"] and "bob/public" not in hub.repos
        assert list(hub.repos["ann/contested"].files("main"))[-1] == "x"

    def test_broken_front_matter(self, hub, interrupted):
        kind, message = interrupted["broken"]
        assert kind == "ValueError" and "README.md in ann/broken is broken" in message
        assert list(hub.repos["ann/broken"].files("main")) == ["README.md"]

    def test_interrupted_upload(self, interrupted, pulled):
        """The tensors were there, the commit was not; what was there before loads (`pulled` came after)."""
        assert interrupted["interrupted"]
        (refs, lfs), (refs_after, lfs_after) = interrupted["before"], interrupted["after"]
        assert refs == refs_after and len(lfs_after - lfs) == 1
        assert pulled["outputs"]["public: model"]


class TestPushedCard:
    def test_front_matter(self, hub, pushed):
        data = card(hub, "ann/public").data
        assert data.library_name == "peft" and data.base_model == "ann/kan" and data.metrics == ["r2"]
        assert data.tags == ["base_model:adapter:ann/kan", "digits", "kan", "lotra", "peft-plugin"]
        (result,) = data.eval_results
        assert (result.task_type, result.metric_type, result.metric_value) == ("tabular-regression", "r2", 0.9)

    def test_what_a_person_wrote_is_kept(self, hub, pushed):
        for revision in ("main", "generated"):
            found = card(hub, "ann/kept", revision)
            assert found.data.license == "mit" and {"mine", "lotra"} <= set(found.data.tags)
            assert found.text.startswith("\n# My adapter\n\nIt reads scans.\n")
            assert found.text.count("## Use it") == 1
        assert found.data.eval_results[0].metric_value == 0.5 and "other = KAN" in found.text

    def test_table(self, hub, pushed):
        text = card(hub, "ann/public").text
        assert "| `kan.layers.0` | peft-lotra | (8, 3, 9) | (2, 2, 2) | 48 | 0.2 |" in text
        assert "| **total** | | | | **94** | **0.4** |" in text
        assert "| other: `kan.layers.0` | peft-lotra | (8, 3, 9) | (1, 2, 3) |" in card(hub, "ann/several").text


class TestCommandsOnTheHub:
    def test_inspect(self, pulled):
        info = json.loads(pulled["cli"]["inspect"]["stdout"])
        assert info["base_model"] == "ann/kan" and info["parameters"] == 94
        assert "(2, 2, 2)" in pulled["cli"]["inspect named"]["stdout"]  # the only one, though not the default
        assert "(1, 2, 3)" in pulled["cli"]["inspect other"]["stdout"]

    @pytest.mark.parametrize("how", ["merged", "extracted"])
    def test_merge_and_extract(self, pushed, pulled, how):
        difference = torch.tensor(pulled["outputs"][f"v2: {how}"]) - torch.tensor(pushed["outputs"]["v2"])
        assert difference.abs().max() < 1e-5

    def test_push(self, hub, pulled):
        assert pulled["cli"]["push"]["code"] == 0 and pulled["cli"]["push a copy"]["code"] == 0
        commit = json.loads(pulled["cli"]["push"]["stdout"])["commit"]
        assert hub.repos["ann/extracted"].refs["main"] == commit
        assert (
            "mine" in card(hub, "ann/extracted").data.tags and card(hub, "ann/extracted").data.base_model == "ann/kan"
        )
        # the card of a copy loads the copy
        assert '"ann/copy"' in card(hub, "ann/copy").text and '"ann/public"' not in card(hub, "ann/copy").text

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("missing", "error: ann/nothing is neither a folder here nor a repository on the Hub"),
            ("no adapter", "error: ann/kan is no adapter"),
            ("lora", "error: ann/lora holds a LORA adapter"),
            ("other base", "error: The adapter does not fit the model"),
            ("no model", "error: "),
        ],
    )
    def test_errors(self, pulled, folder, what, message):
        result = pulled["cli"][what]
        assert result["code"] == 1 and result["stdout"] == ""
        assert result["stderr"].startswith(message) and result["stderr"].count("\n") == 1
        assert not list(folder.glob("*not-written*"))


def test_a_script_with_a_hub_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, huggingface_hub\nhuggingface_hub.create_repo(sys.argv[1])\n")
    command = [sys.executable, str(WORKER.with_name("hub_server.py")), str(script), "user/kan"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "user/kan on the stand-in for the Hub:\n    .gitattributes\n"


def test_a_hub_that_is_started_too_late_is_refused():
    code = "import huggingface_hub\nfrom hub_server import start_hub\nstart_hub('user')"
    env = os.environ | {"PYTHONPATH": str(WORKER.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "RuntimeError: Restart Python" in result.stderr


LATER = """
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from peft import PeftModel, get_peft_model
from peft_lotra import LoTRAConfig, push_to_hub
from peft_lotra.hub import push
from peft_lotra.kan import KANLinear

base = torch.nn.Sequential(KANLinear(3, 4), KANLinear(4, 2))
config = LoTRAConfig(r=2, init_weights=False)
model = get_peft_model(base, config, adapter_name="anna")
model.add_adapter("ben", config)
push_to_hub(model, "user/all", base_code="base = make()  # mine", metrics={"anna": {"mse": 0.25}, "ben": {"mse": 0.5}})
base = model.unload()

api = HfApi()
for name in ("broken", "other"):  # what no card of ours is about
    text = b'{"peft_type": "LORA"}' if name == "other" else b"{"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        api.upload_file(path_or_fileobj=text, path_in_repo=f"{name}/{file}", repo_id="user/all")
before = set(api.list_repo_files("user/all"))

fay = get_peft_model(base, config, adapter_name="fay")
push_to_hub(fay, "user/all", metrics={"fay": {"mse": 0.125}})
added = set(api.list_repo_files("user/all")) - before
assert added == {"fay/adapter_config.json", "fay/adapter_model.safetensors"}, added
card = Path(hf_hub_download("user/all", "README.md")).read_text()
base = fay.unload()
loaded = PeftModel.from_pretrained(base, "user/all", subfolder="anna", adapter_name="anna")
push_to_hub(loaded, "user/all")  # again, without metrics: nothing is lost
again = Path(hf_hub_download("user/all", "README.md")).read_text()
# what the download of several files returns where the Hub does not answer: a folder without them
push.snapshot_download = lambda *_, **__: Path("nothing").absolute()
push_to_hub(loaded, "user/all", tags=["third"])
third = Path(hf_hub_download("user/all", "README.md")).read_text()
assert "- third" in third
for text in (card, again, third):
    assert all(f"{name}: `0`" in text for name in ("anna", "ben", "fay")), text
    assert "base = make()  # mine" in text and "base = ..." not in text, text
    assert all(f"{name}: mse" in text for name in ("anna", "ben", "fay")), text
    assert "broken" not in text and "other:" not in text, text
"""


def test_an_adapter_that_is_added_later(tmp_path):
    """The card lists those that were there, with their results and the code of the base; their files stay."""
    (tmp_path / "later.py").write_text(LATER)
    command = [sys.executable, str(WORKER.with_name("hub_server.py")), str(tmp_path / "later.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
