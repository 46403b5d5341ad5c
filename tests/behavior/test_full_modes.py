# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modes without a factor: a matrix times one learned shape, the dense update, and mixtures with factors."""

import copy
import json

import pytest
import torch
from helpers import X, adapt, assert_equal, layer_of, load, lotra_layers, net, refused, train
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    start_from_gradient,
)
from peft_lotra.kan import KAN


ONE_SHAPE = ("full", "full", 1)
FORMS = [ONE_SHAPE, "full", ("full", 2, 2), (2, "full", "full"), (2, 2, "full")]

pytestmark = pytest.mark.filterwarnings("ignore:Adapters have more parameters")


def forms(model: nn.Module, name: str = "default") -> list[tuple]:
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
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    assert saved == (r if isinstance(r, str) else list(r))
    assert_equal(loaded(X), model(X))
    assert forms(loaded) == forms(model) == [modes, modes]


def test_a_rank_of_the_size_of_its_mode_is_full():
    model = adapt(r=4, rank_pattern={"layers.0": (6, 3, 1)})

    assert forms(model) == [ONE_SHAPE, ("full", 4, 4)]
    assert [layer.lotra_r["default"] for layer in lotra_layers(model).values()] == [(6, 3, 1), (4, 4, 4)]
    assert model.get_nb_trainable_parameters()[0] == (18 + 9) + (4**3 + 4 * 6 + 4 * 9)


def test_adam_steps_of_the_dense_update_are_those_of_full_fine_tuning():
    kan = KAN([3, 5, 2], dtype=torch.float64)
    model = get_peft_model(copy.deepcopy(kan), LoTRAConfig(r="full"))

    for network in (kan, model):
        train(network, X.double(), steps=20)

    for layer, tuned in zip(lotra_layers(model).values(), kan.layers, strict=True):
        expected = torch.cat([tuned.spline_weight, tuned.base_weight.unsqueeze(-1)], -1)
        assert_close(layer.effective_coefficients(), expected.detach())


def test_the_optimizer_has_a_group_for_each_component_that_there_is():
    optimizer = create_lotra_optimizer(adapt(r=ONE_SHAPE), torch.optim.Adam, lr=1e-2)

    assert {group["name"].partition("/")[0] for group in optimizer.param_groups} - {"other"} == {
        "core",
        "factor_basis",
    }


BAD = {
    "misspelt": ({"r": ("full", "ful", 1)}, '`r` should be a positive integer or "full"'),
    "two modes": ({"r": ("full", 1)}, "three of them"),
    "misspelt in a pattern": ({"rank_pattern": {"layers.0": "ful"}}, "`rank_pattern` should be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_contradictory_configuration_is_refused(name):
    values, message = BAD[name]

    with refused(message):
        LoTRAConfig(**values)


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


def test_the_basis_factor_of_a_start_from_the_gradient_is_the_leading_shape():
    base, x = KAN([3, 4], dtype=torch.float64), X.double()
    layer = base.layers[0]
    base(x).sin().sum().backward()
    gradient = torch.cat([layer.spline_weight.grad, layer.base_weight.grad.unsqueeze(-1)], -1)
    model = get_peft_model(base, LoTRAConfig(r=ONE_SHAPE))

    start_from_gradient(model, lambda: model(x).sin().sum())

    adapter = layer_of(model)
    factor = adapter.get_components("default").factor_basis.detach()
    expected = torch.linalg.svd(gradient.flatten(0, 1), full_matrices=False).Vh[0]
    assert_close((factor.squeeze(1) @ expected).abs(), torch.tensor(3.0, dtype=torch.float64))
