# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line on folders; `hub/test_push.py` runs it on the Hub."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from typer.testing import CliRunner

import peft_lotra
from peft_lotra import LoTRAConfig, ParametricAdapter, cli
from peft_lotra.kan import KAN, KANConfig, KANModel


X = torch.linspace(-0.9, 0.9, 12).view(6, 2)
NETS = """
import torch
from peft_lotra.kan import KAN

def build():
    return KAN([2, 4, 3])

def with_head():
    model = torch.nn.Sequential()
    model.add_module("kan", KAN([2, 4, 3]))
    model.add_module("head", torch.nn.Linear(3, 1))
    return model

def number():
    return 3

class Unknown(torch.nn.Module):  # of two factors that depend on other inputs: no KAN layer, but nobody can know
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 2, 3
        self.table = torch.nn.Parameter(torch.rand(3, 2, 4))

    def forward(self, graph, x):
        return torch.einsum("oik,bi,bk->bo", self.table, x, graph)

def with_a_candidate():
    return torch.nn.Sequential(KAN([2, 2]), Unknown())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models and adapters, as folders and files, and what they put out."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    KANModel(KANConfig(widths=(2, 4, 3))).save_pretrained(folder / "base")
    KANModel(KANConfig(widths=(2, 5, 3))).save_pretrained(folder / "other")
    tuned = KANModel.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder / "tuned")

    model = get_peft_model(KANModel.from_pretrained(folder / "base"), LoTRAConfig(r=2, init_weights=False))
    model.add_adapter("second", LoTRAConfig(r=(1, 2, 3), alpha=0.5, init_weights=False))
    model.save_pretrained(folder / "adapter")

    (folder / "nets.py").write_text(NETS)
    kan = KAN([2, 4, 3])
    save_model(kan, folder / "base.safetensors")
    with torch.no_grad():
        for parameter in kan.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_model(kan, folder / "tuned.safetensors")
    adapted = get_peft_model(kan, LoTRAConfig(r=2, init_weights=False))
    adapted.save_pretrained(folder / "plain-adapter")

    lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(folder / "lora")
    broken = {
        "no-tensors": None,
        "bytes": b"not safetensors",
        "half": {"base_model.model.kan.layers.0.lotra_core": torch.zeros(2, 2, 2)},
        "misfit": {
            f"base_model.model.kan.layers.0.lotra_{part}": torch.zeros(2, 2) for part in ("factor_out", "factor_in")
        }
        | {"base_model.model.kan.layers.0.lotra_factor_basis": torch.zeros(2, 3)}
        | {"base_model.model.kan.layers.0.lotra_core": torch.zeros(2, 2, 2)},
        "nan": {k: v * float("nan") for k, v in load_file(folder / "adapter" / "adapter_model.safetensors").items()},
    }
    for name, content in broken.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_bytes((folder / "adapter/adapter_config.json").read_bytes())
        if isinstance(content, bytes):
            (folder / name / "adapter_model.safetensors").write_bytes(content)
        elif content is not None:
            save_file(content, folder / name / "adapter_model.safetensors")
    (folder / "no-tensors" / "adapter_model.bin").write_bytes(b"pickled")
    shutil.copytree(folder / "adapter", folder / "training" / "checkpoint-10")
    family = ParametricAdapter(KANModel.from_pretrained(folder / "base"), ranks=2)
    family.fit([1.0, 2.0], train=lambda model, c: None, progress=False)
    family.save_pretrained(folder / "family")
    (folder / "bad-family").mkdir()
    (folder / "bad-family" / "parametric_adapter.safetensors").write_bytes(b"no family")
    (folder / "no-json").mkdir()
    (folder / "no-json" / "adapter_config.json").write_text("{")
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """Runs a command in an empty folder; `{}` in an argument is the folder with the models."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, code: int = 0):
        result = CliRunner().invoke(cli.app, [part.format(made) for part in shlex.split(command)])
        assert result.exit_code == code, result.output
        return result

    return run


def output(model):
    with torch.no_grad():
        found = model(X)
    return getattr(found, "logits", found)


class TestInspect:
    def test_table(self, run):
        out = run("inspect {}/adapter").stdout
        assert "kan.layers.0" in out and "(4, 2, 9)" in out and "(2, 2, 2)" in out and "total" in out

    def test_json(self, run, made):
        info = json.loads(run("inspect {}/adapter --subfolder second --json").stdout)
        assert info["base_class"] == "KANModel" and info["dtype"] == ["float32"] and info["finite"]
        assert [layer["ranks"] for layer in info["layers"]] == [[1, 2, 3], [1, 2, 3]]
        parameters = (6 + 4 * 1 + 2 * 2 + 9 * 3) + (6 + 3 * 1 + 4 * 2 + 9 * 3)
        assert info["parameters"] == parameters and info["bytes"] == 4 * parameters
        model = PeftModel.from_pretrained(KANModel.from_pretrained(made / "base"), made / "adapter/second")
        for layer in info["layers"]:
            delta = model.get_base_model().get_submodule(layer["name"]).get_delta_weight("default")
            assert layer["norm"] == pytest.approx(delta.norm().item(), rel=1e-6) and layer["alpha"] == 0.5

    def test_values_that_are_not_finite(self, run):
        assert "NaN" in run("inspect {}/nan").stdout
        info = json.loads(run("inspect {}/nan --json").stdout)
        assert not info["finite"] and info["layers"][0]["norm"] is None

    def test_a_family(self, run, made):
        out = run("inspect {}/family").stdout
        assert "2 members of 16 coordinates" in out and "kan.layers.0 (2, 2, 2)" in out
        info = json.loads(run("inspect {}/family --json").stdout)
        assert info["members"] == [{"parameter": [c], "indicator": None} for c in (1.0, 2.0)] and not any(info["log"])
        assert info["bytes"] == (made / "family/parametric_adapter.safetensors").stat().st_size


class TestMerge:
    @pytest.mark.parametrize("subfolder", ["", "second"])
    def test_a_transformers_model(self, run, made, subfolder):
        option = f" --subfolder {subfolder}" if subfolder else ""
        assert "merged 2 layers" in run(f"merge {{}}/base {{}}/adapter out{option}").stdout
        merged = KANModel.from_pretrained("out")
        model = PeftModel.from_pretrained(KANModel.from_pretrained(made / "base"), made / "adapter" / subfolder)
        torch.testing.assert_close(output(merged), output(model), rtol=0, atol=1e-6)
        assert not any("lotra" in name for name in merged.state_dict())
        assert os.listdir() == ["out"]
        # as readable as any other folder
        assert stat.S_IMODE(os.stat("out").st_mode) == stat.S_IMODE(os.stat(made / "base").st_mode)

    def test_a_torch_module(self, run, made, monkeypatch):
        monkeypatch.chdir(made)
        run("merge base.safetensors plain-adapter merged --factory nets:build --json")
        base, merged = KAN([2, 4, 3]), KAN([2, 4, 3])
        load_model(base, "base.safetensors")
        load_model(merged, "merged/model.safetensors")
        model = PeftModel.from_pretrained(base, "plain-adapter")
        torch.testing.assert_close(output(merged), output(model), rtol=0, atol=1e-6)

    def test_modules_that_are_saved_whole(self, run, made, monkeypatch):
        monkeypatch.chdir(made)
        monkeypatch.syspath_prepend(made)
        with_head = importlib.import_module("nets").with_head
        base = with_head()
        save_model(base, "with-head.safetensors")
        model = get_peft_model(base, LoTRAConfig(r=2, modules_to_save=["head"], init_weights=False))
        with torch.no_grad():
            base.head.weight.add_(1)
        expected = output(model.eval())
        model.save_pretrained("head-adapter")
        assert "saved whole" in run("inspect head-adapter").stdout
        assert json.loads(run("inspect head-adapter --json").stdout)["layers"][-1]["ranks"] is None
        out = run("merge with-head.safetensors head-adapter with-head --factory nets:with_head").stdout
        assert "merged 2 layers" in out and "replaced head" in out
        merged = with_head()
        load_model(merged, "with-head/model.safetensors")
        torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-6)

    def test_the_dtype_is_kept(self, run, made):
        KANModel.from_pretrained(made / "base").double().save_pretrained("double")
        run("merge double {}/adapter out")
        assert {t.dtype for t in load_file("out/model.safetensors").values()} == {torch.float64}

    def test_an_empty_folder_may_be_there(self, run):
        os.mkdir("out")
        run("merge {}/base {}/adapter out")
        assert "config.json" in os.listdir("out")


class TestExtract:
    @pytest.mark.parametrize("how", ["--energy 1", "--rank 4,2,9", "--budget 100000"])
    def test_everything(self, run, made, how):
        run(f"extract {{}}/base {{}}/tuned out {how}")
        assert set(os.listdir("out")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        model = PeftModel.from_pretrained(KANModel.from_pretrained(made / "base"), "out")
        difference = output(model) - output(KANModel.from_pretrained(made / "tuned"))
        assert difference.abs().max() < (1e-5 if how != "--rank 4,2,9" else 1)

    def test_report(self, run):
        report = json.loads(run("extract {}/base {}/tuned out --rank 2 --json").stdout)
        assert report["ranks"] == {"kan.layers.0": [2, 2, 2], "kan.layers.1": [2, 2, 2]}
        assert all(0 < error < 1 for error in report["errors"].values())
        assert json.loads(run("inspect out --json").stdout)["parameters"] == report["parameters"]

    def test_torch_modules(self, run, made, monkeypatch):
        monkeypatch.chdir(made)
        out = run("extract base.safetensors tuned.safetensors extracted --energy 0.5 --factory nets:build").stdout
        assert "layers.0" in out and "error" in out
        assert "base = KAN([2, 4, 3]" in Path("extracted/README.md").read_text()


class TestFind:
    def test_a_model_on_disk(self, run):
        text = run("find {}/base").stdout
        assert "kan.layers.0  peft-lotra     (4, 2, 8)  yes" in text and "kan.layers.1" in text

    def test_a_factory(self, run, made, monkeypatch):
        monkeypatch.chdir(made)
        found = json.loads(run("find nets:with_a_candidate --json").stdout)
        assert [(layer["name"], layer["shape"]) for layer in found["layers"]] == [("0.layers.0", [2, 2, 8])]
        (candidate,) = found["candidates"]
        assert candidate["name"] == "1" and candidate["parameters"] == {"table": [3, 2, 4]}
        assert not candidate["is_verified"] and "register_kan_layer" in candidate["registration"]
        text = run("find nets:with_a_candidate").stdout
        assert candidate["registration"] in text and "1, a Unknown, may be a KAN layer (not verified):" in text

    def test_a_model_without_kan_layers(self, run):
        assert run("find torch.nn:ReLU").stdout == "no KAN layer of a known family\n"


ERRORS = {
    "find {}/nothing/here": "is no folder, and cannot be a repository",
    "find nowhere:build": "The factory nowhere:build was not found",
    "find torch:get_num_threads": "returns a int",
    "inspect {}/base": "is no adapter: it has no adapter_config.json",
    "inspect {}": "choose one by --subfolder",
    "inspect {}/training": "is no adapter",
    "inspect {}/nothing/here": "is no folder, and cannot be a repository",
    "inspect {}/lora": "holds a LORA adapter",
    "inspect {}/no-tensors": "has no adapter_model.safetensors",
    "inspect {}/bytes": "is damaged",
    "inspect {}/bad-family": "is damaged",
    "merge {}/base {}/family out": "is a family of them (ParametricAdapter)",
    "inspect {}/half": "has no lotra_factor_out",
    "inspect {}/misfit": "do not fit each other",
    "inspect {}/no-json": "is broken",
    "inspect {}/adapter --subfolder third": "has no adapter `third`, only ['default', 'second']",
    "inspect {}/adapter --revision main": "is a folder here",
    "merge {}/base {}/base out": "is no adapter",
    "merge {}/adapter {}/adapter out": "is no model: it has no config.json",
    "merge {}/other {}/adapter out": "The adapter does not fit the model",
    "merge {}/base {}/plain-adapter out": "The adapter was made for another model",
    "merge {}/base {}/nan out": "values that are not finite",
    "merge {}/base {}/bytes out": "is damaged",
    "merge {}/base {}/adapter {}/tuned": "exists already",
    "merge {}/base {}/adapter no/such/out": "is no folder: make it first",
    "merge {}/base.safetensors {}/plain-adapter out": "say by --factory",
    "merge {}/base.safetensors {}/plain-adapter out --factory nowhere:build": "was not found",
    "merge {}/base {}/plain-adapter out --factory nets": "expected MODULE:CALLABLE",
    "merge {}/base {}/plain-adapter out --factory torch.nn:Identity": "must be a .safetensors file",
    "merge {}/base.safetensors {}/plain-adapter out --factory torch.nn:Identity": "is no state dict of what",
    "merge {}/base.safetensors {}/plain-adapter out --factory torch:get_num_threads": "returns a int",
    "extract {}/base {}/base out --energy 0.9": "nothing to extract",
    "extract {}/base {}/other out --energy 0.9": "different architectures",
    "extract {}/base {}/tuned out --energy 2": "energy",
    "extract {}/base {}/tuned out --rank a,b": "expected a number, or three",
    "push {}/base ann/kan": "is no adapter",
    "push {}/adapter ann/kan": "Not logged in",
}


class TestErrors:
    @pytest.mark.parametrize(("command", "message"), ERRORS.items())
    def test_one_line_and_nothing_written(self, run, made, command, message, monkeypatch):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("peft_lotra.hub.push.get_token", lambda: None)
        before = sorted(made.rglob("*"))
        result = run(command, code=1)
        assert result.stdout == "" and message in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert os.listdir() == [] and sorted(made.rglob("*")) == before

    @pytest.mark.parametrize(
        "command",
        [
            "extract {}/base {}/tuned out",
            "extract {}/base {}/tuned out --rank 2 --energy 0.9",
            "extract {}/base {}/tuned out --budget many",
            "merge {}/base",
            "nothing",
            "inspect ''",
            "inspect ' '",
            "inspect {}/adapter --subfolder ''",
            "inspect {}/adapter --revision ''",
            "merge '' {}/adapter out",
            "merge {}/base {}/adapter ''",
            "extract {}/base '' out --rank 2",
            "push {}/adapter ''",
        ],
    )
    def test_wrong_usage(self, run, command):
        result = run(command, code=2)
        assert "Traceback" not in result.output and os.listdir() == []

    def test_an_interrupted_save_leaves_nothing(self, run, monkeypatch):
        def dies(self, folder, *args, **kwargs):
            (Path(folder) / "config.json").write_text("{")
            raise OSError("No space left on device")

        monkeypatch.setattr(KANModel, "save_pretrained", dies)
        assert "No space left" in run("merge {}/base {}/adapter out", code=1).stderr
        assert os.listdir() == []

    def test_the_traceback_on_request(self, run, monkeypatch):
        monkeypatch.setenv("PEFT_LOTRA_DEBUG", "1")
        assert isinstance(run("inspect {}/base", code=1).exception, ValueError)


@pytest.mark.parametrize("command", ["", "inspect", "merge", "extract", "push"])
def test_help(run, command):
    out = run(f"{command} --help").stdout
    assert "Usage: " in out and "--help" in out and (not command or "ADAPTER" in out or "TUNED" in out)


def test_version(run):
    assert run("--version").stdout.strip() == peft_lotra.__version__


def test_as_a_program(made, tmp_path):
    """What a shell sees of it, beside the messages: exit codes, and no traceback."""
    command = [sys.executable, "-m", "peft_lotra.cli", "inspect", str(made / "base")]
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"error: {made / 'base'} is no adapter: it has no adapter_config.json.\n"


def test_typer_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    spec = importlib.util.spec_from_file_location("peft_lotra.cli_without_typer", cli.__file__)
    with pytest.raises(SystemExit, match="pip install typer rich"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_slim_and_card(tmp_path, monkeypatch):
    from peft import get_peft_model
    from safetensors.torch import save_file
    from typer.testing import CliRunner

    from peft_lotra import LoTRAConfig
    from peft_lotra.kan import KAN, KANConfig, KANModel

    monkeypatch.chdir(tmp_path)
    KANModel(KANConfig(widths=[8, 16, 4])).save_pretrained("dense")
    save_file({"x": torch.rand(200, 8)}, "x.safetensors")
    done = CliRunner().invoke(cli.app, ["slim", "dense", "small", "--energy", "0.9", "--inputs", "x.safetensors"])
    assert done.exit_code == 0 and KANModel.from_pretrained("small").config.ranks is not None
    assert CliRunner().invoke(cli.app, ["slim", "dense", "other", "--inputs", "x.safetensors"]).exit_code == 2
    save_file({"x": torch.rand(2, 8), "y": torch.rand(2, 8)}, "two.safetensors")
    done = CliRunner().invoke(cli.app, ["slim", "dense", "other", "--rank", "2", "--inputs", "two.safetensors"])
    assert done.exit_code == 1 and "holds 2 tensors" in done.output and not Path("other").exists()

    get_peft_model(KAN([4, 16, 4]), LoTRAConfig(r=2)).save_pretrained("adapter")
    done = CliRunner().invoke(cli.app, ["card", "adapter", "--metric", "accuracy=0.8", "--license", "mit"])
    assert done.exit_code == 0
    assert "license: mit" in Path("adapter/README.md").read_text()
    assert CliRunner().invoke(cli.app, ["card", "adapter", "--metric", "accuracy"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["card", "nowhere"]).exit_code == 1
