# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a LoTRAConfig says, and where it goes."""

import numpy as np
import pytest
import torch
from behaving import X, adapted, layers, net
from peft import PeftConfig, get_peft_model

from peft_lotra import LoTRAConfig


def ranks(**config):
    return {name[-1]: layer.lotra_r["default"] for name, layer in layers(adapted(**config)).items()}


def test_ranks():
    assert ranks(r=2) == {"0": (2, 2, 2), "1": (2, 2, 2)}
    assert ranks(r=(1, 2, 3)) == {"0": (1, 2, 3), "1": (1, 2, 3)}
    assert ranks(r=100) == {"0": (6, 3, 9), "1": (4, 6, 9)}  # capped by the sizes
    for pattern in ("layers.1", r".*\.1"):
        assert ranks(r=2, rank_pattern={pattern: (1, 2, 3)}) == {"0": (2, 2, 2), "1": (1, 2, 3)}
    first = next(iter(layers(adapted(r=(1, 2, 3))).values())).get_components("default")
    assert [tuple(p.shape) for p in first] == [(1, 2, 3), (6, 1), (3, 2), (9, 3)]


def test_alpha():
    for alpha in (1.0, 4.0):
        first, second = layers(adapted(alpha=alpha, alpha_pattern={"layers.1": 3.0})).values()
        assert first.lotra_scaling["default"] == first.lotra_alpha["default"] == alpha
        dense = torch.einsum("abc,oa,ib,kc->oik", *first.get_components("default"))
        torch.testing.assert_close(first.get_delta_weight("default"), alpha * dense)
        assert second.lotra_alpha["default"] == 3


def test_numbers_of_numpy(tmp_path):
    config = {"alpha": np.float32(2), "alpha_pattern": {"layers.1": np.float64(3)}, "rank_dropout": np.float32(0.5)}
    adapted(**config).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.alpha, loaded.alpha_pattern, loaded.rank_dropout) == (2, {"layers.1": 3}, 0.5)


NAMES = [("all-kan", "01"), (["0", "1"], "01"), (["layers.0"], "0"), (r".*layers\.1", "1"), (None, "01")]
TARGETS = [("target_modules", value, expected) for value, expected in NAMES]
OTHERS = [
    ("exclude_modules", ["layers.0"], "1"),
    ("exclude_modules", r".*\.1", "0"),
    ("layers_to_transform", [1], "1"),
]


@pytest.mark.parametrize(("name", "value", "expected"), [*TARGETS, *OTHERS])
def test_which_layers(name, value, expected):
    assert "".join(ranks(**{name: value})) == expected


@pytest.mark.parametrize("target", ["head", "nothing"])
def test_no_such_kan_layer(target):
    base = net()
    with pytest.raises(ValueError, match=target):
        get_peft_model(base, LoTRAConfig(target_modules=[target]))
    assert not layers(base)


SIZES = [("r", 0), ("r", (1, 2)), ("r", "4"), ("rank_pattern", [2])]
NUMBERS = [("alpha", "1"), ("alpha", float("nan")), ("alpha_pattern", {"a": "b"}), ("rank_dropout", 1.5)]
CHOICES = [("init_weights", "lora"), ("train", ["cores"]), ("check_base", "maybe")]


@pytest.mark.parametrize(("name", "value"), [*SIZES, *NUMBERS, *CHOICES, ("target_modules", 3)])
def test_wrong_values(name, value):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        LoTRAConfig(**{name: value})


@pytest.mark.parametrize("name", ["lora_alpha", "init_lora_weights"])
def test_arguments_of_lora(name):
    with pytest.raises(TypeError, match=name) as error:
        LoTRAConfig(**{name: 1})
    assert name.replace("lora_", "") in str(error.value).replace(name, "")


def test_saved_and_loaded(tmp_path):
    config = {
        "r": (1, 2, 3),
        "alpha": 2.5,
        "rank_pattern": {"layers.1": (1, 1, 2)},
        "alpha_pattern": {"layers.0": 0.5},
    }
    config |= {"target_modules": {"layers.0"}, "train": ["core"], "init_weights": "hosvd", "modules_to_save": ["head"]}
    config |= {"rank_dropout": 0.25, "module_dropout": 0.5, "adapt_residual": False}
    LoTRAConfig(**config).save_pretrained(tmp_path)
    for loaded in (LoTRAConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LoTRAConfig and loaded.peft_type == "LOTRA"
        assert {name: getattr(loaded, name) for name in config} == config


def test_the_residual_is_left_alone():
    merged, base = adapted(adapt_residual=False).merge_and_unload().kan.layers[0], net().kan.layers[0]
    assert merged.base_weight.equal(base.base_weight) and not merged.spline_weight.equal(base.spline_weight)


@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
def test_dropout_is_for_training_alone(name):
    model = adapted(**{name: 0.5})
    assert model(X).equal(model(X))
    model.train()
    assert len({tuple(model(X).flatten().tolist()) for _ in range(20)}) > 1
