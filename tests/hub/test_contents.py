# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The contents of adapters, in models and in folders."""

from __future__ import annotations

import json

import normed
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lotra import LoTRAConfig
from peft_lotra.files.format import MAX_CONFIG_BYTES
from peft_lotra.hub import adapter_table
from peft_lotra.hub.contents import (
    AdapterContents,
    adapter_folders,
    peft_type_of,
    read_adapter,
    table_of_tensors,
)
from peft_lotra.kan import KAN


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2, init_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


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


class TestAdapterFolders:
    def test_names(self, folder):
        assert adapter_folders(folder) == {"default": folder}
        for name in ("other", "checkpoint-10", "checkpoint-best"):
            (folder / name).mkdir()
            (folder / name / "adapter_config.json").write_text("{}")
        (folder / "empty").mkdir()
        assert list(adapter_folders(str(folder))) == ["default", "checkpoint-best", "other"]
        (folder / "adapter_config.json").unlink()
        assert list(adapter_folders(folder)) == ["checkpoint-best", "other"]

    def test_none(self, tmp_path):
        assert adapter_folders(tmp_path) == adapter_folders(tmp_path / "nothing") == {}


class TestReadAdapter:
    def test_all_tensors(self, folder):
        config, tensors = read_adapter(folder)
        assert isinstance(config, LoTRAConfig) and config.r == 2
        assert set(tensors) == set(load_file(folder / "adapter_model.safetensors")) and len(tensors) == 8

    def test_no_adapter(self, tmp_path):
        with pytest.raises(ValueError, match="is no adapter: it has no adapter_config.json"):
            read_adapter(tmp_path)

    def test_another_method(self, tmp_path):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).save_pretrained(
            tmp_path
        )
        assert peft_type_of(tmp_path / "adapter_config.json") == "LORA"
        with pytest.raises(ValueError, match="holds a LORA adapter, and not one of LoTRA"):
            read_adapter(tmp_path)

    def test_pickled_weights(self, folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ValueError, match="Pickled weights are not read"):
            read_adapter(folder)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", "3", "null", '"LOTRA"', "[" * 100_000, '{"a":' * 100_000])
    def test_broken_configuration(self, folder, text):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="is broken: expected a JSON object with a `peft_type`"):
            read_adapter(folder)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("auto_mapping", ["a"]),
            ("base_model_name_or_path", {"a": 1}),
            ("revision", 7),
            ("alpha", 10**400),
            ("alpha_pattern", {"a{99999999999999999999}": 2.0}),
            ("alpha_pattern", {"(?i)a": 2.0}),
            ("alpha_pattern", {"(a+)+$": 2.0}),
        ],
    )
    def test_fields_that_cannot_be_used(self, folder, field, value):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "integrity": None, field: value}))
        with pytest.raises(ValueError, match="is broken: |may take forever|must be"):
            read_adapter(folder)

    def test_a_file_that_is_too_long(self, folder):
        (folder / "adapter_config.json").write_text(" " * (MAX_CONFIG_BYTES + 1))
        with pytest.raises(ValueError, match="that a config may have"):
            read_adapter(folder)

    def test_broken_tensors(self, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
        with pytest.raises(ValueError, match="is damaged"):
            read_adapter(folder)


class TestAdapterContents:
    def test_numbers(self, folder):
        contents = AdapterContents.of("mine", *read_adapter(folder))
        values = json.loads(json.dumps(contents.as_dict()))
        assert values["adapter"] == "mine" and values["peft_type"] == "LOTRA" and values["base_class"] == "KAN"
        assert values["dtype"] == ["float32"] and values["finite"] and values["bytes"] == 4 * values["parameters"]
        assert [layer["shape"] for layer in values["layers"]] == [[4, 2, 9], [1, 4, 9]]
        assert values["parameters"] == sum(layer["parameters"] for layer in values["layers"]) == 38 + 31

    def test_text(self, folder):
        config, tensors = read_adapter(folder)
        title, first, _, total = str(AdapterContents.of("mine", config, tensors)).splitlines()
        assert title.split()[:2] == ["layer", "family"] and title.endswith("parameters   kB")
        assert first.split()[:2] == ["layers.0", "peft-lotra"] and "(4, 2, 9)" in first and "(2, 2, 2)" in first
        assert total.split() == ["total", "69", "0.3"]
        broken = {name: tensor * float("nan") for name, tensor in tensors.items()}
        assert "NaN or infinite" in str(AdapterContents.of("mine", config, broken))

    def test_incomplete_components(self, folder):
        config, tensors = read_adapter(folder)
        key = next(key for key in tensors if key.endswith("lotra_factor_in"))
        with pytest.raises(ValueError, match="do not fit each other"):
            table_of_tensors(config, {**tensors, key: tensors[key][:, :1]})
        with pytest.raises(ValueError, match="has no lotra_factor_in for .* it is not complete"):
            table_of_tensors(config, {name: tensor for name, tensor in tensors.items() if name != key})

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
    def test_other_dtypes(self, folder, dtype):
        config, tensors = read_adapter(folder)
        first = next(iter(tensors))
        assert AdapterContents.of("mine", config, {**tensors, first: tensors[first].to(dtype)}).finite

    def test_all_dtypes(self, folder):
        config, tensors = read_adapter(folder)
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first].half()}, folder / "adapter_model.safetensors")
        contents = AdapterContents.of("mine", config, load_file(folder / "adapter_model.safetensors"))
        assert contents.dtype == ["float16", "float32"] and contents.bytes < 4 * contents.parameters


def test_running_statistics_have_a_row_of_their_own():
    model = normed.adapt(modules_to_save=["2.bn"])
    model.train()
    model(normed.X)
    rows = {row.name: row for row in adapter_table(model)}
    assert list(rows) == ["0", "2", "0.bn", "1", "2.base_layer.bn"]
    kinds = {name: row.cells()[0] for name, row in rows.items()}
    assert kinds["0.bn"] == kinds["1"] == "running statistics" and kinds["2.base_layer.bn"] == "saved whole"
    assert kinds["0"] == "fast-kan"
