# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The files of adapters, read without a model."""

import torch
from helpers import refused
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.hub.contents import describe_tensors, read_adapter
from peft_lotra.kan import KAN


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


def test_a_configuration_without_tensors_is_no_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOTRA"}')

    with refused("is no adapter: it has no adapter_model.safetensors"):
        read_adapter(tmp_path)
