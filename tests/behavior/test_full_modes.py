# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modes without a factor: a matrix times one learned shape, the dense update, and mixtures with factors."""

import pytest
from helpers import X, adapt, assert_equal, config_of, load, lotra_layers, net, refused
from peft import get_peft_model
from safetensors.torch import load_file

from peft_lotra import (
    LoTRAConfig,
)


ONE_SHAPE = ("full", "full", 1)
FORMS = [ONE_SHAPE, "full", ("full", 2, 2), (2, "full", "full"), (2, 2, "full")]

pytestmark = pytest.mark.filterwarnings("ignore:Adapters have more parameters")


def forms(model, name="default"):
    return [layer.get_components(name).form for layer in lotra_layers(model).values()]


@pytest.mark.parametrize("r", FORMS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_has_no_factor_of_a_full_mode(r, low_cpu_mem_usage, tmp_path):
    model = adapt(r=r)

    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    modes = (r,) * 3 if isinstance(r, str) else r
    factors = {name for name, rank in zip(("out", "in", "basis"), modes, strict=True) if rank != "full"}
    names = {name.rpartition(".lotra_")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"core", *(f"factor_{name}" for name in factors)}
    saved = config_of(tmp_path)["r"]
    assert saved == (r if isinstance(r, str) else list(r))
    assert_equal(loaded(X), model(X))
    assert forms(loaded) == forms(model) == [modes, modes]


def test_a_rank_of_the_size_of_its_mode_is_full():
    model = adapt(r=4, rank_pattern={"layers.0": (6, 3, 1)})

    assert forms(model) == [ONE_SHAPE, ("full", 4, 4)]
    assert [layer.lotra_r["default"] for layer in lotra_layers(model).values()] == [(6, 3, 1), (4, 4, 4)]
    assert model.get_nb_trainable_parameters()[0] == (18 + 9) + (4**3 + 4 * 6 + 4 * 9)


@pytest.mark.parametrize(
    "config",
    [
        {"train": ["factor_in"], "r": 3},
        {"train": ["factor_out"], "r": ONE_SHAPE},
        {"train": ["factor_out"], "rank_pattern": {"layers.1": ONE_SHAPE}},
    ],
)
def test_a_layer_in_which_nothing_would_be_trained_is_refused(config):
    model = net()

    with refused("leaves nothing to train in `kan.layers", model):
        get_peft_model(model, LoTRAConfig(**config))
