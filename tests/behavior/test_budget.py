# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Ranks from a budget, a share of the coefficients of the adapted layers."""

import pytest
import torch
from helpers import assert_equal, config_of, lotra_layers, refused
from peft import PeftModel, get_peft_model
from stand_ins import ConvNet

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN


def share_of(model, config):
    """The trained parameters as a share of the coefficients, and the forms by layer."""
    layers = lotra_layers(model).values()
    coefficients = 0
    for layer in layers:
        basis = slice(None) if config.adapt_residual else slice(layer.lotra_tensor.shape[2])
        coefficients += layer.get_base_weight()[:, :, basis].numel()
    trained, _ = model.get_nb_trainable_parameters()
    return trained / coefficients, [layer.get_components("default").form for layer in layers]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("budget", [1, 0.5, 0.27, 0.13, 0.08, 0.03])
def test_a_budget_is_kept_and_mostly_used(budget, residual):
    config = LoTRAConfig(budget=budget, adapt_residual=residual)

    share, _ = share_of(get_peft_model(KAN([40, 32, 20]), config), config)

    assert 0.75 * budget < share <= budget


@pytest.mark.parametrize(
    "budget, forms",
    [
        (1.0, [("full", "full", "full")] * 2),
        (0.25, [("full", "full", 2)] * 2),
        (0.12, [("full", "full", 1)] * 2),
        (0.10, [(13, 13, 1), ("full", 13, 1)]),
        (0.0077, [(1, 1, 1)] * 2),
    ],
)
def test_full_matrices_for_one_shape_or_several_are_taken_where_they_fit(budget, forms):
    config = LoTRAConfig(budget=budget)

    _, chosen = share_of(get_peft_model(KAN([64, 32, 5]), config), config)

    assert chosen == forms


def test_convolutions_keep_their_kernel():
    config = LoTRAConfig(budget=0.5)

    share, forms = share_of(get_peft_model(ConvNet("fastkanconv").eval(), config), config)

    assert share <= 0.5
    assert forms[0][3] == "full"


def test_layers_in_the_pattern_keep_their_ranks_and_count():
    config = LoTRAConfig(budget=0.12, rank_pattern={r"layers\.0": (2, 3, 2)})

    share, forms = share_of(get_peft_model(KAN([64, 32, 5]), config), config)

    assert forms[0] == (2, 3, 2)
    assert forms[1] == ("full", "full", "full")
    assert share <= 0.12


def test_a_configuration_serves_models_of_several_sizes():
    config = LoTRAConfig(budget=0.12)

    for widths in ([64, 32, 5], [3, 7, 7, 2]):
        share, _ = share_of(get_peft_model(KAN(widths), config), config)
        assert share <= 0.12
    assert config.rank_pattern == {}
    assert config.r is None
    assert config.target_modules is None


def test_a_file_says_the_ranks_and_loads_without_data(tmp_path):
    model = get_peft_model(KAN([64, 32, 5]), LoTRAConfig(budget=0.1, init_weights=False))
    model.save_pretrained(tmp_path)

    entries = config_of(tmp_path)
    base = KAN([64, 32, 5])
    loaded = PeftModel.from_pretrained(base, str(tmp_path), check_base="ignore")

    assert entries["rank_pattern"] == {r"^layers\.0": [13, 13, 1], r"^layers\.1": ["full", 13, 1]}
    assert entries["budget"] == 0.1
    assert entries["r"] is None
    for name, value in model.state_dict().items():
        if "lotra_" in name:
            assert_equal(loaded.state_dict()[name], value)


def test_a_bank_takes_a_budget():
    config = LoTRAConfig(budget=0.12, init_weights=False)
    bank = AdapterBank(KAN([16, 8, 4]))

    bank.add("first", config)

    rows = torch.rand(4, 16)
    assert (bank.attach()(rows, ids=bank.ids(["first"] * 4)) - bank.base(rows)).abs().max() > 1e-3
    assert config.rank_pattern == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0.1, "r": 4}, "one of `r` and `budget`; got r=4 and budget=0.1"),
        ({"budget": 0}, r"`budget` is 0, but must be a number in \(0, 1\]"),
        ({"init_weights": "gradient"}, r"start_from_gradient\(model, loss\)"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    model = KAN([4, 3])

    with refused(message, model):
        get_peft_model(model, LoTRAConfig(**options))


def add_second(model, config):
    model.add_adapter("second", config)


@pytest.mark.parametrize("attach", [get_peft_model, add_second])
def test_a_budget_below_one_rank_says_what_suffices_and_changes_nothing(attach):
    model = KAN([64, 32, 5])
    if attach is add_second:
        model = get_peft_model(model, LoTRAConfig(r=2))

    with refused("smallest ranks already take 153 of the 19872 coefficients.*at least 0.0077", model):
        attach(model, LoTRAConfig(budget=0.005))

    attach(model, LoTRAConfig(budget=0.0077))


def test_the_least_budget_of_a_tiny_layer_is_that_of_its_dense_update():
    """Since factors of rank 1 would have more parameters."""
    with refused("take 9 of the 9 coefficients.*at least 1.0"):
        get_peft_model(KAN([1, 1]), LoTRAConfig(budget=0.9))

    assert get_peft_model(KAN([1, 1]), LoTRAConfig(budget=1.0)).get_nb_trainable_parameters()[0] == 9
