# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The contents of adapters, in models and in folders."""

import shutil

import pytest
import torch
from helpers import refused
from peft import LoraConfig, get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.hub.contents import AdapterContents, adapter_folders, read_adapter
from peft_lotra.kan import KAN


@pytest.fixture
def folder(tmp_path):
    get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2, init_weights=False)).save_pretrained(tmp_path)
    return tmp_path


def test_contents_have_a_row_for_each_layer(tmp_path):
    base = torch.nn.ModuleDict({"kan": KAN([2] * 12), "head": torch.nn.Linear(3, 1)})
    pattern = {"layers.1": 0.5}
    config = LoTRAConfig(r=(1, 2, 3), alpha=2.0, alpha_pattern=pattern, modules_to_save=["head"], init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    rows = {row.name: row for row in AdapterContents.of("saved", *read_adapter(tmp_path)).layers}

    assert list(rows) == [*(f"kan.layers.{number}" for number in range(11)), "head"]

    for name, alpha in (("kan.layers.0", 2.0), ("kan.layers.1", 0.5)):
        row, delta = rows[name], base.get_submodule(name).get_delta_weight("default")
        assert row[:5] == (name, "peft-lotra", tuple(delta.shape), (1, "full", 3), alpha)
        assert row.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert row.parameters == 6 + row.shape[0] + 3 * row.shape[2]  # the two inputs have no factor

    assert rows["head"] == ("head", "saved copy", None, None, None, None, 4)


def test_folders_with_adapters_are_listed(folder):
    assert adapter_folders(folder) == {"default": folder}

    lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(folder / "lora")
    for name in ("other", "checkpoint-10", "checkpoint-best", ".saving"):
        shutil.copytree(folder, folder / name, ignore=lambda *_: ["lora", "other", "checkpoint-10", "checkpoint-best"])

    assert list(adapter_folders(str(folder))) == ["default", "checkpoint-best", "other"]
    with refused("has no adapter_config.json"):
        adapter_folders(folder / "nothing")


def test_contents_are_printed_as_a_table(folder):
    config, tensors = read_adapter(folder)
    contents = AdapterContents.of("mine", config, tensors)

    assert contents.bytes == 4 * contents.parameters

    title, first, _, total = str(contents).splitlines()

    assert title.split()[:2] == ["layer", "kind"]
    assert first.split()[:2] == ["layers.0", "peft-lotra"]
    assert "(4, 2, 9)" in first
    assert "(2, full, 2)" in first
    assert total == "64 parameters, 0.3 kB of float32"


def test_a_broken_file_is_named(folder):
    for text in ("{", "[]", "{}"):
        (folder / "adapter_config.json").write_text(text)
        with refused("adapter_config.json is damaged"):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LOTRA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")

    with refused("adapter_model.safetensors is damaged"):
        read_adapter(folder)

    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    with refused("is no adapter: it has no adapter_model.safetensors"):
        read_adapter(folder)
