# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from helpers import ALLOWED
from peft import AutoPeftModel, get_peft_model
from transformers import AutoModel

from peft_lotra import LoTRAConfig, kan
from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKAN


MODELS = [
    lambda: KAN([2, 3, 1]),
    lambda: SlimKAN([2, 3, 1], (1, 2, 2)),
    lambda: KANModel(KANConfig([2, 3, 1])).kan,
]


@pytest.mark.parametrize("make", MODELS)
def test_models_name_the_public_module_and_are_copied(make):
    assert all(hasattr(kan, name) for name in kan.__all__)
    model, x = make(), torch.rand(5, 2)
    assert type(model).__module__ == "peft_lotra.kan"
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("library", ["peft_lotra.kan", "peft_lotra.kan.modeling_kan"])
def test_files_of_adapters_name_the_public_module_and_old_ones_load(library, tmp_path):
    KANModel(KANConfig([2, 3, 1])).save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["auto_mapping"] == {"base_model_class": "KANModel", "parent_library": "peft_lotra.kan"}
    config["auto_mapping"]["parent_library"] = library
    file.write_text(json.dumps(config))
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", **ALLOWED)
    x = torch.rand(5, 2)
    assert torch.equal(loaded(x).logits, model(x).logits)
