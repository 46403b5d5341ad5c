# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line on folders; `hub/test_push.py` runs it on the Hub."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.testing import assert_close
from typer.testing import CliRunner

import peft_lotra
from peft_lotra import LoTRAConfig, cli
from peft_lotra.kan import KAN, KANConfig, KANModel


X = torch.linspace(-0.9, 0.9, 12).view(6, 2)
NETS = """import torch, peft_lotra.kan
build = lambda: torch.nn.ModuleDict({"kan": peft_lotra.kan.KAN([2, 4, 3]), "head": torch.nn.Linear(3, 1)})"""


@torch.no_grad()
def change(model):
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models and adapters, as folders and files."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    KANModel(KANConfig(widths=(2, 4, 3))).save_pretrained(folder / "base")
    KANModel(KANConfig(widths=(2, 5, 3))).save_pretrained(folder / "other")
    change(KANModel.from_pretrained(folder / "base")).save_pretrained(folder / "tuned")
    model = get_peft_model(KANModel.from_pretrained(folder / "base"), LoTRAConfig(r=2, init_weights=False))
    model.add_adapter("second", LoTRAConfig(r=(1, 2, 3), alpha=0.5, init_weights=False))
    model.save_pretrained(folder / "adapter")
    (folder / "nets.py").write_text(NETS)
    save_model(KAN([2, 4, 3]), folder / "base.safetensors")
    (folder / "nan").mkdir()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    (folder / "nan/adapter_config.json").write_text(json.dumps(config | {"weights_sha256": None}))
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    save_file({k: v * float("nan") for k, v in tensors.items()}, folder / "nan/adapter_model.safetensors")
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """Runs a command in an empty folder; `{}` in an argument is the folder with the models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(command: str, code: int = 0):
        result = CliRunner().invoke(cli.app, [part.replace("{}", str(made)) for part in shlex.split(command)])
        assert result.exit_code == code, result.output
        return result

    return run


@torch.no_grad()
def output(model):
    result = model(X)
    return getattr(result, "logits", result)


def test_inspect_tells_layers_ranks_and_norms(run, made):
    out = run("inspect {}/adapter").stdout

    assert "layers.0" in out
    assert "(4, 2, 9)" in out
    assert "(2, full, 2)" in out
    assert "74 parameters" in out

    info = json.loads(run("inspect {}/adapter --subfolder second --json").stdout)

    assert info["base_class"] == "KANModel"
    assert info["dtype"] == ["float32"]
    assert info["finite"]
    assert [layer["ranks"] for layer in info["layers"]] == [[1, "full", 3], [1, 2, 3]]

    model = PeftModel.from_pretrained(KANModel.from_pretrained(made / "base"), made / "adapter/second")
    layer = info["layers"][0]
    delta = model.get_base_model().get_submodule(layer["name"]).get_delta_weight("default")

    assert layer["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert layer["alpha"] == 0.5
    assert "NaN" in run("inspect {}/nan").stdout
    assert json.loads(run("inspect {}/nan --json").stdout)["layers"][0]["norm"] is None


def test_names_print_without_control_characters(tmp_path):
    get_peft_model(KAN([2, 1]), LoTRAConfig(r=1)).save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({k.replace("layers.0", "kan\x1b[2Jx"): v for k, v in load_file(weights).items()}, weights)
    values = json.loads(config.read_text()) | {"base_model_name_or_path": "user/re\u202epo"}
    for code, peft_type in ((0, "LOTRA"), (1, "LO\x9b31mRA")):
        config.write_text(json.dumps(values | {"peft_type": peft_type}))
        result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
        assert result.exit_code == code and result.output.replace("\n", "").isprintable(), ascii(result.output)


@pytest.mark.parametrize("subfolder", ["", "second"])
def test_merge_saves_the_merged_model(run, made, subfolder):
    os.mkdir("out")

    assert "merged into a KANModel, saved in out" in run(f"merge {{}}/base {{}}/adapter/{subfolder} out").stdout

    merged = KANModel.from_pretrained("out")
    model = PeftModel.from_pretrained(KANModel.from_pretrained(made / "base"), made / "adapter" / subfolder)

    assert_close(output(merged), output(model), rtol=1e-5, atol=1e-5)
    assert not any("lotra" in name for name in merged.state_dict())


def test_merge_takes_a_torch_module_by_its_factory(run, made, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    base = torch.nn.ModuleDict({"kan": KAN([2, 4, 3]), "head": torch.nn.Linear(3, 1)})
    save_model(base, tmp_path / "net.safetensors")
    model = get_peft_model(base, LoTRAConfig(r=2, modules_to_save=["head"], init_weights=False))
    change(base["head"].modules_to_save["default"])
    model.save_pretrained(tmp_path / "adapter")
    where = f"{tmp_path}/net.safetensors {tmp_path}/adapter {tmp_path}/out"
    info = json.loads(run(f"merge {where} --factory nets:build --json").stdout)

    assert [layer["name"] for layer in info["layers"]] == ["kan.layers.0", "kan.layers.1", "head"]

    merged = torch.nn.ModuleDict({"kan": KAN([2, 4, 3]), "head": torch.nn.Linear(3, 1)})
    load_model(merged, tmp_path / "out/model.safetensors")

    for name, x in (("kan", X), ("head", torch.rand(4, 3))):
        assert_close(merged[name](x), base[name](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "anna"])
def test_merge_takes_the_lora_that_was_saved_with_the_adapter(run, made, name, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    network = torch.nn.ModuleDict({"kan": KAN([2, 4, 3]), "head": torch.nn.Linear(3, 1)})
    save_model(network, tmp_path / "net.safetensors")
    model = get_peft_model(network, LoTRAConfig(r=2, init_weights=False), name)
    lora = LoraConfig(r=1, target_modules=["head"], init_lora_weights=False)
    inject_adapter_in_model(lora, network, "rest")
    model.save_pretrained(tmp_path / "adapter")
    where = f"{tmp_path}/net.safetensors {tmp_path}/adapter {tmp_path}/out"

    run(f"merge {where} --factory nets:build")

    merged = torch.nn.ModuleDict({"kan": KAN([2, 4, 3]), "head": torch.nn.Linear(3, 1)})
    load_model(merged, tmp_path / "out/model.safetensors")
    x = torch.rand(4, 3)
    assert_close(merged["head"](x), network["head"](x), rtol=1e-5, atol=1e-5)
    assert_close(merged["kan"](X), network["kan"](X), rtol=1e-5, atol=1e-5)


def test_extract_saves_an_adapter(run, made):
    report = json.loads(run("extract {}/base {}/tuned out --energy 1 --json").stdout)

    assert set(os.listdir("out")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(run("inspect out --json").stdout)["parameters"] == report["parameters"]

    model = PeftModel.from_pretrained(KANModel.from_pretrained(made / "base"), "out")
    difference = output(model) - output(KANModel.from_pretrained(made / "tuned"))

    assert difference.abs().max() < 1e-5


def test_find_lists_kan_layers(run, made, monkeypatch):
    assert "layers.0  peft-lotra     (4, 2, 8)  spline_weight, base_weight" in run("find {}/base").stdout
    assert run("find torch.nn:ReLU").stdout == "no KAN layer was found\n"

    monkeypatch.chdir(made)
    report = json.loads(run("find nets:build --json").stdout)

    assert [(layer["name"], layer["shape"]) for layer in report["layers"]][0] == ("kan.layers.0", [4, 2, 8])


ERRORS = {
    "find nowhere:build": "No module named 'nowhere'",
    "inspect {}/base": "has no adapter_config.json",
    "inspect {}/nothing/here": "There is no file or folder {}/nothing/here, and no repository",
    "find examples/nope": "There is no file or folder examples/nope, and no repository",
    "find {}": "{} is no transformers model: it has no config.json",
    "merge {}/adapter {}/adapter out": "config.json",
    "inspect {}/adapter --subfolder third": "has the adapters default, second: choose one by --subfolder",
    "merge {}/other {}/adapter out": "The adapter is for another base",
    "merge {}/base {}/nan out": "not finite",
    "merge {}/base {}/adapter {}/tuned": "exists already",
    "merge {}/base.safetensors {}/adapter out": "the function that builds its network, `--factory",
    "extract {}/base {}/base out --energy 0.9": "nothing to extract",
}


@pytest.mark.parametrize(("command", "message"), ERRORS.items())
def test_an_error_is_one_line_and_nothing_is_written(run, made, command, message):
    result = run(command, code=1)

    assert result.stdout == ""
    assert message.replace("{}", str(made)) in result.stderr
    assert os.listdir() == []
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


USAGE = ["extract {}/base {}/tuned out", "extract {}/base {}/tuned out --energy a", "merge {}/base", "push a b"]


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_is_exit_code_2(run, command):
    assert "Traceback" not in run(command, code=2).output
    assert os.listdir() == []


def test_the_package_runs_as_a_program(made):
    command = [sys.executable, "-m", "peft_lotra", "inspect", str(made / "base")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {made / 'base'} is no adapter")


def test_the_version_is_printed():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == peft_lotra.__version__
