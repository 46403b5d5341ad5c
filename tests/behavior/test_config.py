# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a LoTRAConfig says, where it goes, and the ranks without `r`."""

import copy
import dataclasses
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import adapt, assert_equal, config_of, edit_config, inputs, lotra_layers, nested
from peft import PeftConfig, PeftModel, get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


def test_the_constructor_is_that_of_a_dataclass():
    config = LoTRAConfig(r=3, alpha=2.0)
    names = [field.name for field in dataclasses.fields(LoTRAConfig)]

    assert list(inspect.signature(LoTRAConfig).parameters) == names

    copies = [dataclasses.replace(config), copy.copy(config), copy.deepcopy(config)]
    copies += [pickle.loads(pickle.dumps(config)), LoTRAConfig(**dataclasses.asdict(config))]

    assert all(copied == config and copied is not config for copied in copies)


def test_lists_become_sets_and_tuples():
    assert LoTRAConfig(target_modules=["a", "b", "a"]).target_modules == {"a", "b"}
    assert LoTRAConfig(modules_to_save="head").modules_to_save == ["head"]
    assert LoTRAConfig(r=[1, 2, 3], rank_pattern={"x": [1, 2, 3]}).rank_pattern == {"x": (1, 2, 3)}


def ranks(**config):
    return {name[-1]: layer.lotra_r["default"] for name, layer in lotra_layers(adapt(**config)).items()}


def test_ranks_are_numbers_or_triples_and_at_most_the_sizes():
    assert ranks(r=2) == {"0": (2, 2, 2), "1": (2, 2, 2)}
    assert ranks(r=(1, 2, 3)) == {"0": (1, 2, 3), "1": (1, 2, 3)}
    assert ranks(r=100) == {"0": (6, 3, 9), "1": (4, 6, 9)}  # capped by the sizes
    for pattern in ("layers.1", r".*\.1"):
        assert ranks(r=2, rank_pattern={pattern: (1, 2, 3)}) == {"0": (2, 2, 2), "1": (1, 2, 3)}


SIZES = [("r", 0), ("r", (1, 2)), ("r", "4"), ("r", ("full", "ful", 1)), ("rank_pattern", {"a": "ful"})]
NUMBERS = [
    ("alpha", "1"),
    ("alpha", float("nan")),
    ("alpha", 0),
    ("alpha_pattern", {"a": "b"}),
    ("alpha_pattern", {"a": 0}),
]
CHOICES = [
    ("init_weights", "lora"),
    ("train", ["cores"]),
    ("check_base", "maybe"),
    ("adapt_residual", "False"),
    ("storage", "fp16"),
    ("storage", torch.float16),
]


@pytest.mark.parametrize(("name", "value"), [*SIZES, *NUMBERS, *CHOICES])
def test_a_wrong_value_is_refused_by_its_name(name, value):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        LoTRAConfig(**{name: value})


def test_a_saved_config_is_loaded_as_it_was(tmp_path):
    config = {
        "r": (1, 2, 3),
        "alpha": np.float32(2.5),
        "rank_pattern": {"layers.1": (1, 1, 2)},
        "alpha_pattern": {"layers.0": np.float64(0.5)},
    }
    config |= {"target_modules": {"layers.0"}, "train": ["core"], "init_weights": "hosvd", "modules_to_save": ["head"]}
    config |= {"adapt_residual": False}
    LoTRAConfig(**config).save_pretrained(tmp_path)

    for loaded in (LoTRAConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LoTRAConfig
        assert loaded.peft_type == "LOTRA"
        assert {name: getattr(loaded, name) for name in config} == config


REGEXES = {
    "targets": {"target_modules": r"(body|tail\.layers)\.\d"},
    "excluded": {"exclude_modules": r".*\.1"},
    "numbers": {
        "rank_pattern": {r"body\.\d": 1, "tail.layers.0": (1, 2, 2)},
        "alpha_pattern": {r"tail.*[02]": 0.5, "body.0": 3.0},
    },
    "default ranks": {"r": None},
}


@pytest.mark.parametrize("name", REGEXES)
def test_regexes_mean_the_same_after_loading(name, tmp_path):
    bare, x = nested(), inputs()
    model = adapt(copy.deepcopy(bare), **{"r": 2, **REGEXES[name]})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare, tmp_path).eval()

    assert_equal(loaded(x), model(x))

    ranks = [[layer.lotra_r for layer in lotra_layers(m).values()] for m in (model, loaded)]

    assert ranks[0] == ranks[1]


def test_keys_of_lora_and_of_newer_versions_are_dropped_with_a_warning(tmp_path):
    LoTRAConfig(r=3).save_pretrained(tmp_path)
    edit_config(tmp_path, lora_alpha=8, from_the_future=1)

    with pytest.warns(UserWarning, match="'from_the_future', 'lora_alpha'"):
        assert LoTRAConfig.from_pretrained(tmp_path).r == 3


@pytest.mark.parametrize("r", [2, None])
@pytest.mark.parametrize("target_modules", [None, ["layers.0"], r"layers\.\d"])
def test_one_config_serves_several_models(r, target_modules, tmp_path):
    config = LoTRAConfig(r=r, target_modules=target_modules, init_weights=False)
    bases = {"a": KAN([9, 8, 2]), "b": KAN([3, 3, 9])}
    models = {name: get_peft_model(copy.deepcopy(model), config).eval() for name, model in bases.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for name, model in bases.items():
        x = torch.rand(4, model.layers[0].in_features)
        assert_equal(PeftModel.from_pretrained(model, tmp_path / name)(x), models[name](x))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("widths", [[2, 5, 1], [2, 8, 8, 1], [64, 32], [1, 1]])
def test_the_default_is_a_full_matrix_times_one_shape(widths, tmp_path):
    model = get_peft_model(KAN(widths), LoTRAConfig())

    model.save_pretrained(tmp_path)
    saved = config_of(tmp_path)["rank_pattern"]
    forms = [layer.get_components("default").form for layer in lotra_layers(model).values()]

    assert forms == [("full", "full", 1)] * (len(widths) - 1)
    assert [tuple(ranks) for ranks in saved.values()] == forms


def test_an_explicit_rank_stays_with_a_warning():
    with pytest.warns(UserWarning, match="more parameters"):
        model = get_peft_model(KAN([2, 5, 1]), LoTRAConfig(r=4))
    assert [layer.lotra_r["default"] for layer in lotra_layers(model).values()] == [(4, 2, 4), (1, 4, 4)]


def test_inputs_far_outside_of_the_grid_warn_once():
    model = get_peft_model(KAN([2, 5, 1]), LoTRAConfig())

    with pytest.warns(UserWarning, match="layers.0.*outside"):
        model(torch.full((8, 2), 50.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.full((8, 2), 50.0))  # once
        get_peft_model(KAN([2, 5, 1]), LoTRAConfig())(torch.rand(8, 2) * 2 - 1)
