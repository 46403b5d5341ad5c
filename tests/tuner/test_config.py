# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from helpers import base, inputs, nested
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict

from peft_lotra import LoTRAConfig
from peft_lotra.tuner.arguments import regexes_of


def saved_and_loaded(config, folder):
    config.save_pretrained(folder)
    assert type(PeftConfig.from_pretrained(folder)) is LoTRAConfig
    return LoTRAConfig.from_pretrained(folder)


def test_defaults():
    config = LoTRAConfig()
    assert config.peft_type is PeftType.LOTRA and not config.is_prompt_learning
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert (
        values
        | {
            "r": 4,
            "alpha": 1.0,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
            "adapt_residual": True,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        == values
    )
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        assert values[name] is None
    assert values["base_layers"] is None and values["inference_mode"] is False


def test_every_field_has_its_help_text():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(LoTRAConfig) if field.name not in inherited]
    assert len(own) > 10 and all(field.metadata["help"] for field in own)


@pytest.mark.parametrize("r, expected", [(3, 3), ((1, 2, 3), (1, 2, 3)), ([1, 2, 3], (1, 2, 3))])
def test_ranks(r, expected):
    assert LoTRAConfig(r=r).r == expected
    assert LoTRAConfig(rank_pattern={"layers.0": r}).rank_pattern == {"layers.0": expected}


@pytest.mark.parametrize(
    "r", [0, -2, 1.5, True, "4", None, (2, 2), (2,) * 5, (2, 2, 2, 0), (2, 0, 2), (2, 2, 2.0), []]
)
def test_bad_ranks(r):
    with pytest.raises(ValueError, match="`r` should be a positive integer value"):
        LoTRAConfig(r=r)
    with pytest.raises(ValueError, match="`r` should be a positive integer value"):
        LoTRAConfig(rank_pattern={"layers.0": r})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank_dropout": 1.0}, "`rank_dropout` must be at least 0 and below 1, got 1.0"),
        ({"rank_dropout": -0.1}, "`rank_dropout`"),
        ({"module_dropout": 1.5}, "`module_dropout`"),
        ({"module_dropout": float("nan")}, "`module_dropout`"),
        ({"init_weights": "gaussian"}, "`init_weights` must be .*, got 'gaussian'"),
        ({"init_weights": None}, "`init_weights`"),
        ({"init_weights": ["hosvd"]}, "`init_weights`"),
        ({"train": []}, "`train` must be None or some of the components .*'core'.* got \\[\\]"),
        ({"train": "cores"}, "`train` must be .*, got 'cores'"),
        ({"train": ["core", "core"]}, "`train`"),
        ({"train": ["core", ["factor_in"]]}, "`train`"),
        ({"train": {"core": True}}, "`train`"),
        ({"train": True}, "`train`"),
        ({"layers_pattern": "layers"}, "`layers_pattern` is specified, `layers_to_transform` must also"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
        (
            {"target_modules": ".*", "layers_to_transform": 0, "layers_pattern": "layers"},
            "`layers_to_transform` cannot be used when",
        ),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoTRAConfig(**arguments)


def test_layer_indices_go_with_all_kan_and_with_lists():
    for target in (None, "all-kan", ["0", "1"]):
        config = LoTRAConfig(target_modules=target, layers_to_transform=0, layers_pattern="layers")
        assert config.layers_to_transform == 0


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_lists_of_names_become_sets(field):
    assert getattr(LoTRAConfig(**{field: ["a", "b", "a"]}), field) == {"a", "b"}
    assert getattr(LoTRAConfig(**{field: "a.*"}), field) == "a.*"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"r": 7},
        {"r": (2, 3, 4), "rank_pattern": {"layers.0": (1, 2, 3), "x": 5}, "alpha_pattern": {"layers.0": 0.5}},
        {"target_modules": ["layers.1", "layers.0"], "exclude_modules": ["a"], "modules_to_save": ["head"]},
        {"target_modules": "all-kan", "layers_to_transform": [0, 1], "layers_pattern": ["layers", "body"]},
        {"target_modules": r"layers\.0|b.1", "alpha": 2.5, "rank_dropout": 0.25, "module_dropout": 0.5},
        {"init_weights": False, "adapt_residual": False, "inference_mode": True},
        {"init_weights": "hosvd", "train": ("factor_in", "core")},
        {"base_layers": {"layers.0": {"family": "own", "shape": [4, 3, 8], "has_residual": True}}},
    ],
)
def test_saving_and_loading_gives_an_equal_config(arguments, tmp_path):
    config = LoTRAConfig(**arguments)
    loaded = saved_and_loaded(config, tmp_path)
    inference = {"inference_mode": config.inference_mode}
    assert dataclasses.replace(loaded, **inference) == config
    assert loaded.r == config.r and type(loaded.r) is type(config.r)
    assert loaded.rank_pattern == config.rank_pattern
    assert saved_and_loaded(loaded, tmp_path / "again") == loaded


REGEXES = {
    "targets": {"target_modules": r"(body|tail\.layers)\.\d"},
    "excluded": {"exclude_modules": r".*\.1"},
    "indices": {"layers_to_transform": 0, "layers_pattern": "lay[e]rs"},
    "numbers": {
        "rank_pattern": {r"body\.\d": 1, "tail.layers.0": (1, 2, 2)},
        "alpha_pattern": {r"tail.*[02]": 0.5, "body.0": 3.0},
    },
}


@pytest.mark.parametrize("name", REGEXES)
def test_a_file_has_what_regexes_of_the_user_stand_for(name, tmp_path):
    bare, x = nested(), inputs()
    model = get_peft_model(copy.deepcopy(bare), LoTRAConfig(r=2, init_weights=False, **REGEXES[name])).eval()
    config = model.peft_config["default"]
    before = copy.deepcopy(config.to_dict())
    model.save_pretrained(tmp_path)
    assert config.to_dict() == {**before, "auto_mapping": config.auto_mapping} and regexes_of(config)
    loaded = PeftModel.from_pretrained(bare, tmp_path).eval()
    again = loaded.peft_config["default"]
    assert not regexes_of(again) and set(again.base_layers) == set(config.base_layers)
    assert all(again.ranks_and_alpha(name) == config.ranks_and_alpha(name) for name in config.base_layers)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", REGEXES)
def test_a_file_of_an_older_version_with_regexes(name, tmp_path, monkeypatch):
    model = get_peft_model(nested(), LoTRAConfig(r=2, init_weights=False, **REGEXES[name])).eval()
    monkeypatch.setattr(LoTRAConfig, "_resolved", lambda self, names: {})
    model.save_pretrained(tmp_path)
    if name == "numbers":
        with pytest.raises(ValueError, match="`alpha_pattern`.* save it with this one"):
            LoTRAConfig.from_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {}, "integrity": None}))
    loaded = PeftModel.from_pretrained(nested(), tmp_path)
    tensors, before = (get_peft_model_state_dict(m) for m in (loaded, model))
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[key], before[key]) for key in before)
    # without the tensors, nothing says what the regexes stand for
    with pytest.raises(ValueError, match="may take forever"):
        get_peft_model(nested(), PeftConfig.from_pretrained(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="may take forever"):
        LoTRAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["alpha", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"])
def test_absurd_values(field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        LoTRAConfig(**{field: 10**400})


def test_a_string_in_modules_to_save_is_one_name():
    assert LoTRAConfig(modules_to_save="head").modules_to_save == ["head"]


def test_the_file_is_plain_json(tmp_path):
    LoTRAConfig(r=(2, 3, 4), target_modules=["b", "a"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "LOTRA" and values["r"] == [2, 3, 4]
    assert sorted(values["target_modules"]) == ["a", "b"]


def test_keys_of_a_later_version_are_dropped_with_a_warning(tmp_path):
    LoTRAConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert LoTRAConfig.from_pretrained(tmp_path).r == 3


@pytest.mark.parametrize("target_modules", [None, "all-kan", ["kan"], ".*kan"])
def test_the_users_config_serves_two_models(target_modules):
    config = LoTRAConfig(r=2, target_modules=target_modules, rank_pattern={"kan": (1, 2, 3)})
    before = copy.deepcopy(config.to_dict())
    shapes, models = [], []
    for model in (base("own"), base("cheby-kan", in_features=2, out_features=7)):
        models.append(get_peft_model(model, config))
        models[-1].add_adapter("other", config)
        shapes.append(models[-1].peft_config["other"].base_layers["kan"]["shape"])
        assert models[-1].peft_config["other"] is config  # as everywhere in PEFT, for the last that was given it
    assert shapes == [[4, 3, 8], [7, 2, 5]]
    # PEFT itself notes in it what the base model is
    noted = ("base_model_name_or_path", "auto_mapping", "peft_version", "task_type", "base_layers", "target_modules")
    after = config.to_dict()
    assert {k: v for k, v in after.items() if k not in noted} == {k: v for k, v in before.items() if k not in noted}


def test_models_with_one_config_are_saved_each_as_it_is(tmp_path):
    config = LoTRAConfig(r=2, init_weights=False)
    models = {name: get_peft_model(model, config) for name, model in (("a", base("own")), ("b", nested()))}
    x, expected = inputs(), {}
    for name, model in models.items():
        expected[name] = model.eval()(x)
        model.save_pretrained(tmp_path / name)
    for name, model in models.items():
        assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path / name)(x), expected[name])


def test_all_kan_means_the_layers_of_each_model():
    config = LoTRAConfig(r=2)
    assert set(get_peft_model(base("own"), config).peft_config["default"].base_layers) == {"kan"}
    assert set(get_peft_model(nested(), config).peft_config["default"].base_layers) > {"body.0", "body.1"}


def test_the_config_records_the_layers_that_were_adapted(tmp_path):
    model = get_peft_model(nested(), LoTRAConfig(target_modules=["body.0", "body.1"]))
    recorded = model.peft_config["default"].base_layers
    assert recorded == {
        "body.0": {"family": "peft-lotra", "shape": [5, 3, 8], "has_residual": True},
        "body.1": {"family": "cheby-kan", "shape": [4, 5, 5], "has_residual": False},
    }
    model.save_pretrained(tmp_path)
    assert LoTRAConfig.from_pretrained(tmp_path).base_layers == recorded


def test_a_config_prints_what_was_chosen():
    assert repr(LoTRAConfig(r=(4, 4, 2), alpha=2.0)) == "LoTRAConfig(r=(4, 4, 2), alpha=2.0)"
    assert repr(LoTRAConfig(target_modules=["b", "a"])) == "LoTRAConfig(r=4, target_modules=['a', 'b'])"
