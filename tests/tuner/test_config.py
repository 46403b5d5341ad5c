# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The configuration: plain data, its file, and one configuration for several models."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch
from helpers import base, inputs, lotra_layers, nested
from peft import PeftModel, get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


def test_the_constructor_is_that_of_a_dataclass():
    config = LoTRAConfig(r=3, alpha=2.0)
    names = [field.name for field in dataclasses.fields(LoTRAConfig)]
    assert list(inspect.signature(LoTRAConfig).parameters) == names
    copies = [dataclasses.replace(config), copy.copy(config), copy.deepcopy(config)]
    copies += [pickle.loads(pickle.dumps(config)), LoTRAConfig(**dataclasses.asdict(config))]
    assert all(other == config and other is not config for other in copies)


def test_modes_of_arguments():
    assert LoTRAConfig(target_modules=["a", "b", "a"]).target_modules == {"a", "b"}
    assert LoTRAConfig(modules_to_save="head").modules_to_save == ["head"]
    assert LoTRAConfig(r=[1, 2, 3], rank_pattern={"x": [1, 2, 3]}).rank_pattern == {"x": (1, 2, 3)}
    with pytest.raises(ValueError, match="`layers_transform`|`layers_to_transform` cannot be used when"):
        LoTRAConfig(target_modules=".*", layers_to_transform=[0])


REGEXES = {
    "targets": {"target_modules": r"(body|tail\.layers)\.\d"},
    "excluded": {"exclude_modules": r".*\.1"},
    "indices": {"layers_to_transform": 0, "layers_pattern": "lay[e]rs"},
    "numbers": {
        "rank_pattern": {r"body\.\d": 1, "tail.layers.0": (1, 2, 2)},
        "alpha_pattern": {r"tail.*[02]": 0.5, "body.0": 3.0},
    },
    "default ranks": {"r": None},
}


@pytest.mark.parametrize("name", REGEXES)
def test_saved_with_the_model(name, tmp_path):
    bare, x = nested(), inputs()
    config = LoTRAConfig(**{"r": 2, "init_weights": False, **REGEXES[name]})
    model = get_peft_model(copy.deepcopy(bare), config).eval()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "LOTRA"
    loaded = PeftModel.from_pretrained(bare, tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    ranks = [[layer.lotra_r for layer in lotra_layers(m).values()] for m in (model, loaded)]
    assert ranks[0] == ranks[1]


def test_keys_of_lora_and_of_other_versions_are_dropped_with_a_warning(tmp_path):
    LoTRAConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    others = {"lora_alpha": 8, "from_the_future": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **others, "integrity": "x", "base_digest": None}))
    with pytest.warns(UserWarning, match="'from_the_future', 'lora_alpha'"):
        assert LoTRAConfig.from_pretrained(tmp_path).r == 3


@pytest.mark.parametrize("r", [2, None])
@pytest.mark.parametrize("target_modules", [None, ["layers.0"], r"layers\.\d"])
def test_one_config_for_several_models(r, target_modules, tmp_path):
    config = LoTRAConfig(r=r, target_modules=target_modules, init_weights=False)
    bases = {"a": KAN([9, 8, 2]), "b": KAN([3, 3, 9])}
    models = {name: get_peft_model(copy.deepcopy(model), config).eval() for name, model in bases.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for name, model in bases.items():
        x = torch.rand(4, model.layers[0].in_features)
        assert torch.equal(PeftModel.from_pretrained(model, tmp_path / name)(x), models[name](x))


def test_all_kan_means_the_layers_of_each_model():
    config = LoTRAConfig(r=2)
    assert len(lotra_layers(get_peft_model(base("own"), config))) == 1
    assert len(lotra_layers(get_peft_model(nested(), config))) == 4
