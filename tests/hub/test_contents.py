# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The files of adapters, read without a model."""

import shutil

import pytest
import torch
from helpers import refused
from peft import LoraConfig, get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.hub.contents import adapter_folders, describe_tensors, read_adapter
from peft_lotra.kan import KAN


@pytest.fixture
def folder(tmp_path):
    get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2, init_weights=False)).save_pretrained(tmp_path)
    return tmp_path


def test_ranks_and_sizes_are_described(tmp_path):
    base = torch.nn.ModuleDict({"kan": KAN([2] * 12), "head": torch.nn.Linear(3, 1)})
    model = get_peft_model(base, LoTRAConfig(r=(1, 2, 3), modules_to_save=["head"], storage="float16"))
    model.save_pretrained(tmp_path)
    _, tensors = read_adapter(tmp_path)
    tensors["base_model.model.a\x1b[2J\nb.lotra_core"] = torch.zeros(1, 1, 1)

    hostile, *lines, size = describe_tensors(tensors).splitlines()

    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert hostile == "a\\x1b[2J\\nb: (full, full, full)"
    assert lines == [f"kan.layers.{number}: (1, full, 3)" for number in range(11)]
    assert size.startswith(f"{parameters} parameters, ")
    assert size.endswith(" kB of float16 and float32")


def test_folders_with_adapters_are_listed(folder):
    assert adapter_folders(folder) == {"default": folder}

    lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(folder / "lora")
    for name in ("other", "checkpoint-10", "checkpoint-best", ".saving"):
        shutil.copytree(folder, folder / name, ignore=lambda *_: ["lora", "other", "checkpoint-10", "checkpoint-best"])

    assert list(adapter_folders(str(folder))) == ["default", "checkpoint-best", "other"]
    with refused("has no adapter_config.json"):
        adapter_folders(folder / "nothing")


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
