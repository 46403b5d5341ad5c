# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Pushing and pulling for real, over HTTP, see `hub_server.py` for the server and `hub_worker.py` for the clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hub_server import Blob, Hub, HubServer
from huggingface_hub import EvalResult, ModelCard
from peft import get_peft_model, get_peft_model_state_dict

from peft_lotra import LoTRAConfig, write_model_card
from peft_lotra.hub import adapter_table
from peft_lotra.hub.contents import read_adapter, table_of_tensors
from peft_lotra.kan import KAN, KANConfig, KANModel


WORKER = Path(__file__).parents[1] / "support" / "hub_worker.py"
ALLOWLIST = peft.__version__ >= "0.20"
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
        assert ("public: snippet 1" in names) is ("v2: snippet 1" in names) is ALLOWLIST
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

    @pytest.mark.skipif(not ALLOWLIST, reason="PEFT 0.20 brought the allowlist")
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


###########################
# Cards beside a folder   #
###########################


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kan = KAN([2, 3, 1])


@pytest.fixture
def model():
    return get_peft_model(KANModel(KANConfig(widths=(2, 4, 1))), LoTRAConfig(r=2, init_weights=False))


class TestWriteModelCard:
    def test_beside_a_plain_save(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "More Information Needed" not in text and "## Use it" in text and str(tmp_path) not in text
        # once is as good as twice, and PEFT keeps it
        write_model_card(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == text
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == text
        assert not list(tmp_path.glob("*.new"))

    def test_the_snippet_runs_in_the_folder(self, model, tmp_path, monkeypatch):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        snippet = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path)
        namespace = {}
        exec(snippet, namespace)
        assert type(namespace["model"].get_base_model()) is KANModel
        tensors = get_peft_model_state_dict(namespace["model"])
        for name, tensor in get_peft_model_state_dict(model).items():
            assert torch.equal(tensors[name], tensor)

    def test_text_around_the_part_is_kept(self, model, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("---\nlicense: mit\nbase_model: someone/kan\n---\nBefore.\n")
        write_model_card(model, tmp_path)
        with open(readme, "a") as file:
            file.write("After.\n")
        write_model_card(model, tmp_path, tags="scans", metrics={"mse": 0.1})
        text = readme.read_text()
        assert text.index("Before.") < text.index("## Use it") < text.index("After.")
        assert text.count("## Use it") == 1
        data = ModelCard(text).data
        assert data.license == "mit" and data.base_model == "someone/kan" and "scans" in data.tags
        assert data.eval_results[0].metric_value == 0.1

    def test_a_card_without_front_matter(self, model, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        write_model_card(model, tmp_path)
        assert ModelCard.load(tmp_path / "README.md").text.startswith("# Mine\n")

    @pytest.mark.parametrize(
        "text", ["---\ntags: [a\n---\n", "---\n- a\n- b\n---\n", "---\ntags: a\n", "---\nmodel-index: 3\n---\n"]
    )
    @pytest.mark.parametrize("of_files", [False, True])
    def test_broken_front_matter(self, model, tmp_path, text, of_files):
        model.save_pretrained(tmp_path)
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match="The front matter of .*README.md is broken"):
            write_model_card(None if of_files else model, tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    def test_bad_arguments(self, model, tmp_path):
        with pytest.raises(ValueError, match="is no folder"):
            write_model_card(model, tmp_path / "nothing")
        with pytest.raises(ValueError, match="huggingface_hub.EvalResult"):
            write_model_card(model, tmp_path, metrics=["r2"])
        with pytest.raises(ValueError, match="finite numbers"):
            write_model_card(model, tmp_path, metrics={"r2": "0.9"})
        assert not list(tmp_path.iterdir())

    def test_results_by_the_user(self, model, tmp_path):
        result = EvalResult("tabular-regression", "scikit-learn/diabetes", "Diabetes", "r2", 0.5, metric_name="R2")
        write_model_card(model, tmp_path, metrics=[result])
        assert ModelCard.load(tmp_path / "README.md").data.eval_results == [result]
        assert "| R2 | 0.5 | Diabetes |" in (tmp_path / "README.md").read_text()

    def test_the_same_from_the_files(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        text = (tmp_path / "README.md").read_text()
        write_model_card(None, tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    @pytest.mark.parametrize(
        ("base", "code"),
        [
            (KAN([2, 3, 1], grid_size=4), "base = KAN([2, 3, 1], grid_size=4, spline_order=3, grid_range=(-1, 1))"),
            (Network(), f"from {__name__} import Network\n\nbase = Network()\n# now load into `base` the weights"),
            (torch.nn.Sequential(KAN([2, 1])), "base = ...  # a torch.nn.Sequential, with the weights"),
        ],
    )
    def test_a_base_that_is_not_on_the_hub(self, tmp_path, base, code):
        write_model_card(get_peft_model(base, LoTRAConfig()), tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert code in text and "not on the Hub" in text and "AutoPeftModel" not in text

    def test_a_revision_of_the_base(self, tmp_path):
        base = KANModel(KANConfig(widths=(2, 4, 1)))
        model = get_peft_model(base, LoTRAConfig(revision="v1"))
        write_model_card(model, tmp_path, repo_id="ann/x", base_model="ann/kan")
        text = (tmp_path / "README.md").read_text()
        assert 'KANModel.from_pretrained("ann/kan", revision="v1")' in text and "AutoPeftModel" in text


def test_adapter_table():
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"kan": KAN([2, 4, 3]), "head": torch.nn.Linear(3, 1)})
    config = LoTRAConfig(
        r=(1, 2, 3), alpha=2.0, alpha_pattern={"layers.1": 0.5}, modules_to_save=["head"], init_weights=False
    )
    model = get_peft_model(base, config)
    rows = {row.name: row for row in adapter_table(model)}
    assert list(rows) == ["kan.layers.0", "kan.layers.1", "head"]
    for name, alpha in (("kan.layers.0", 2.0), ("kan.layers.1", 0.5)):
        row, delta = rows[name], base.get_submodule(name).get_delta_weight("default")
        assert row.shape == tuple(delta.shape) and row.ranks == (1, 2, 3) and row.alpha == alpha
        assert row.norm == pytest.approx(delta.norm().item(), rel=1e-6)
        assert row.size == 4 * row.parameters == 4 * (6 + row.shape[0] + 2 * row.shape[1] + 3 * row.shape[2])
    assert rows["head"].ranks is None and rows["head"].parameters == 4


def test_the_order_of_the_table(tmp_path):
    model = get_peft_model(KAN([2] * 13), LoTRAConfig(r=1))
    names = [f"layers.{number}" for number in range(12)]
    assert [row.name for row in adapter_table(model)] == names
    model.save_pretrained(tmp_path)
    assert [row.name for row in table_of_tensors(*read_adapter(tmp_path))] == names
