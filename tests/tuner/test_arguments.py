# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest

from peft_lotra import LoTRAConfig


@pytest.mark.parametrize(
    "name, right",
    [
        ("lora_alpha", "pass `alpha = lora_alpha / r`"),
        ("dropout", "`rank_dropout`"),
        ("lora_dropout", "`module_dropout`"),
        ("rank", "`r`"),
        ("lora_r", "`r`"),
        ("init_lora_weights", "`init_weights`"),
        ("use_rslora", "leave it out"),
        ("bias", "`modules_to_save`"),
        ("target_parameters", "`target_modules`"),
    ],
)
def test_an_argument_of_lora_names_the_right_one(name, right):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'") as caught:
        LoTRAConfig(**{name: 1})
    assert right in str(caught.value)


def test_another_unknown_argument_is_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        LoTRAConfig(nonsense=1)


def test_keys_of_lora_in_a_file_are_dropped_with_a_warning(tmp_path):
    LoTRAConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 8, "bias": "none"}))
    with pytest.warns(UserWarning, match="'bias', 'lora_alpha'"):
        assert LoTRAConfig.from_pretrained(tmp_path).r == 3


def test_the_constructor_is_that_of_a_dataclass():
    config = LoTRAConfig(r=3, alpha=2.0)
    names = [field.name for field in dataclasses.fields(LoTRAConfig)]
    assert list(inspect.signature(LoTRAConfig).parameters) == names
    assert list(inspect.signature(LoTRAConfig.__init__).parameters) == ["self", *names]
    copies = [
        dataclasses.replace(config),
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ]
    assert all(other == config and other is not config for other in copies)
    assert LoTRAConfig(**dataclasses.asdict(config)) == config
