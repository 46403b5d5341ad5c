# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy
from functools import partial

import pytest
import torch
from helpers import adapt, lotra_layers, nested, refused
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


def wide():
    return get_peft_model(KAN([64, 256, 4]), LoTRAConfig(r=2))


def groups_of(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def multipliers(model, policy="width", optimizer_cls=torch.optim.Adam):
    """The rates of the components of each layer at lr=1."""
    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=1.0, policy=policy)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}

    by_component = {}
    for name, parameter in model.named_parameters():
        if parameter in rates:
            layer, component, _ = name.rpartition("layers.")[2].split(".")
            by_component[layer, component.removeprefix("lotra_")] = rates[parameter]
    return by_component


def test_rates_of_adam_fall_with_the_width():
    assert multipliers(wide()) == {
        ("0", "core"): 1,
        ("0", "factor_out"): 1 / 4,
        ("0", "factor_in"): 1 / 2,
        ("0", "factor_basis"): 1,
        ("1", "core"): 1,
        ("1", "factor_out"): 1,
        ("1", "factor_in"): 1 / 4,
        ("1", "factor_basis"): 1,
    }


def test_rates_of_adam_fall_with_ranks_above_4():
    rates = multipliers(get_peft_model(KAN([64, 256]), LoTRAConfig(r=(8, 16, 4))))
    assert list(rates.values()) == [1 / 4, 1 / 8, 1 / 2, 1]  # core, factor_out, factor_in, factor_basis


@pytest.mark.parametrize(("width", "side"), [(16, 1), (64, 1 / 2)])
def test_a_low_rank_that_is_all_of_few_outputs_changes_no_rate(width, side):
    """The layer with one output trains at the rates of rank 4 and of its width, as the layers before it do."""
    rates = multipliers(get_peft_model(KAN([2, width, 1]), LoTRAConfig(r=4)))

    assert rates["1", "core"] == rates["1", "factor_basis"] == rates["0", "core"] == 1
    assert rates["1", "factor_in"] == rates["0", "factor_out"] == side


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.ASGD, partial(torch.optim.SGD, momentum=0.9)])
def test_sgd_has_one_rate(optimizer_cls):
    model = wide()

    assert set(multipliers(model, "width", optimizer_cls).values()) == {1.0}

    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=0.1)

    assert groups_of(optimizer)["factor_out/256"]["lr"] == 0.1


def test_a_start_from_the_gradient_has_rates_of_its_own(tmp_path):
    """Also behind a module of one's own, beside a random start, and after loading."""
    base, x = KAN([64, 256, 4]), torch.rand(8, 64)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2), adapter_name="random")
    model.add_adapter("started", LoTRAConfig(r=2))
    model.set_adapter("started")
    outer = nn.Sequential(model)
    start_from_gradient(outer, lambda: outer(x).square().mean())
    expected = multipliers(wide())
    for layer in "01":
        expected[layer, "core"] *= 0.1
        expected[layer, "factor_out"] *= 0.5

    assert multipliers(outer) == multipliers(model) == pytest.approx(expected)
    assert (
        set(multipliers(model, "uniform").values())
        == set(multipliers(model, "width", torch.optim.SGD).values())
        == {1}
    )

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "started", is_trainable=True)

    assert multipliers(loaded) == pytest.approx(expected)

    for layer in lotra_layers(model).values():
        layer.lotra_core["random"].requires_grad_()
    groups = create_lotra_optimizer(model, torch.optim.Adam, lr=1.0).param_groups

    assert sorted(group["lr"] for group in groups if group["name"] == "core") == [0.1, 1]

    model.set_adapter("random")

    assert multipliers(model) == multipliers(wide())


def test_a_policy_may_give_rates_by_component():
    rates = multipliers(wide(), {"core": 0.5, "factor_in": 0})
    expected = {"core": 0.5, "factor_out": 1, "factor_in": 0, "factor_basis": 1}

    assert rates == {(layer, name): value for layer in "01" for name, value in expected.items()}


def test_every_trainable_parameter_is_in_one_group_and_no_other_one():
    model = adapt(nested(), modules_to_save=["head"])
    next(model.base_model.model["tail"].layers[0].lotra_core.parameters()).requires_grad_(False)
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    assert len(trained) == len(expected)
    assert {id(parameter) for parameter in trained} == expected


def lora_and_head():
    """LoTRA on the KAN layers, LoRA on a linear layer, and a head that is trained whole."""
    network = nn.ModuleDict({"kan": KAN([3, 4]), "linear": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model = get_peft_model(network, LoTRAConfig(r=2, modules_to_save=["head"]))
    lora = LoraConfig(r=2, target_modules=["linear"])
    inject_adapter_in_model(lora, model.base_model.model, adapter_name="lora")
    return model


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_lora_and_heads_train_at_a_rate_of_their_own(optimizer_cls):
    model = lora_and_head()

    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=3e-2, other_lr=1e-3)

    *components, other = optimizer.param_groups
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in other["params"])}
    assert {name.split(".")[3] for name in names} == {"lora_A", "lora_B", "modules_to_save"}
    assert other["name"] == "other"
    assert other["lr"] == 1e-3
    assert {group["lr"] for group in components} == {3e-2}


@pytest.mark.parametrize("other_lr", [None, 1e-3])
def test_a_scheduler_keeps_the_ratio_of_both_rates(other_lr):
    """Without a rate of their own, other parameters train at lr."""
    optimizer = create_lotra_optimizer(lora_and_head(), torch.optim.AdamW, lr=3e-2, other_lr=other_lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    optimizer.step()
    scheduler.step()

    groups = groups_of(optimizer)
    assert groups["core"]["lr"] == pytest.approx(1.5e-2)
    assert groups["other"]["lr"] == pytest.approx((other_lr or 3e-2) / 2)


FROZEN = get_peft_model(KAN([2, 3]), LoTRAConfig(r=2, inference_mode=True))
NOT_TRAINED = "requires a gradient.*get_peft_model.*is_trainable=True"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": KAN([2, 3])}, NOT_TRAINED),
        ({"model": FROZEN}, NOT_TRAINED),
        ({"optimizer_cls": torch.optim.Adam(KAN([2, 3]).parameters())}, "`optimizer_cls` is "),
        ({"other_lr": 0}, r"`other_lr` is 0, but must be a number in \(0, inf\)"),
        ({"lr": 0}, r"`lr` is 0, but must be a number in \(0, inf\)"),
        ({"lr": "0.1"}, "`lr` is '0.1'"),
        ({"policy": "wide"}, '`policy` is .*"width", "uniform".*factor_basis'),
        ({"policy": ["core"]}, "`policy` is"),
        ({"policy": {"core": 1, "factor_up": 2}}, "'factor_up': 2}, but must be .*'factor_basis'"),
        ({"policy": {"core": -1}}, "{'core': -1}, but must be .* multipliers of at least 0"),
        ({"policy": {"core": "1"}}, "{'core': '1'}, but must be .* multipliers of at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    arguments = {"model": wide(), "optimizer_cls": torch.optim.Adam, "lr": 0.1, **arguments}

    with refused(message, error=(TypeError, ValueError)):
        create_lotra_optimizer(**arguments)
