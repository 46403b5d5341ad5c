# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import adapt, lotra_layers, nested
from peft import get_peft_model
from stand_ins import FAMILIES
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, KANConfig, KANModel
from peft_lotra.optim import create_lotra_optimizer, lotra_lr_multipliers


COMPONENTS = ["core", "factor_out", "factor_in", "factor_basis"]


def wide() -> nn.Module:
    return get_peft_model(KAN([64, 256, 4]), LoTRAConfig(r=2))


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {group["name"]: group for group in optimizer.param_groups}


def multipliers(model: nn.Module, *args, **kwargs) -> dict[tuple[str, str], float]:
    table = lotra_lr_multipliers(model, *args, **kwargs)
    return {(line.module.rpartition("layers.")[2], line.component): line.multiplier for line in table}


def test_policy_width_for_adam():
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


class MySGD(torch.optim.SGD):
    pass


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.ASGD, MySGD])
def test_policy_width_for_sgd(optimizer_cls):
    model = get_peft_model(KAN([8, 64, 256, 64]), LoTRAConfig(r=2))
    found = multipliers(model, "width", optimizer_cls)
    assert {component: value for (layer, component), value in found.items()} == {
        "core": 1,
        "factor_out": 2,
        "factor_in": 1,
        "factor_basis": 1,
    }
    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=0.1)
    assert groups_of(optimizer)["factor_out/256"]["lr"] == pytest.approx(0.2)


def test_policy_width_for_sgd_leaves_networks_of_few_outputs_alone():
    assert set(multipliers(wide(), "width", torch.optim.SGD).values()) == {1}


def test_the_caller_says_which_rule_counts():
    model = wide()
    assert multipliers(model, rule="sgd") == multipliers(model, "width", torch.optim.SGD)
    optimizer = create_lotra_optimizer(model, torch.optim.SGD, lr=0.1, rule="adaptive")
    assert groups_of(optimizer)["factor_out/256"]["lr"] == pytest.approx(0.025)


def test_networks_up_to_the_reference_width_are_trained_as_by_one_rate():
    model = get_peft_model(KAN([2, 16, 16, 1]), LoTRAConfig(r=2))
    assert multipliers(model) == multipliers(model, "uniform")
    assert set(multipliers(model).values()) == {1}


def test_policy_by_component():
    found = multipliers(wide(), {"core": 0.5, "factor_in": 0})
    expected = {"core": 0.5, "factor_out": 1, "factor_in": 0, "factor_basis": 1}
    assert found == {(layer, name): value for layer in "01" for name, value in expected.items()}


def test_the_table_prints():
    lines = str(lotra_lr_multipliers(wide())).splitlines()
    assert lines[0].split() == ["module", "adapter", "component", "shape", "multiplier"]
    assert len(lines) == 9
    assert lines[2].split() == ["layers.0", "default", "factor_out", "(256,", "2)", "0.25"]


def test_the_table_in_plain_values():
    lines = lotra_lr_multipliers(wide()).as_dict()["components"]
    assert len(lines) == 8
    assert lines[1] == {
        "module": "layers.0",
        "adapter": "default",
        "component": "factor_out",
        "shape": (256, 2),
        "width": 256,
        "multiplier": 0.25,
    }


def test_one_group_for_each_component_and_width():
    model = get_peft_model(KAN([32, 32, 32, 48]), LoTRAConfig(r=2))
    groups = groups_of(create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2))
    sizes = {name: len(group["params"]) for name, group in groups.items()}
    assert sizes == {"core": 3, "factor_out/32": 2, "factor_out/48": 1, "factor_in/32": 3, "factor_basis": 3}


def test_every_trainable_parameter_is_in_one_group_and_no_other_one():
    model = adapt(nested(), modules_to_save=["head"])
    next(model.base_model.model["tail"].layers[0].lotra_core.parameters()).requires_grad_(False)
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(trained) == len(expected)
    assert {id(parameter) for parameter in trained} == expected


@pytest.mark.parametrize("policy", ["width", "uniform", {name: 3.0 for name in COMPONENTS}])
def test_modules_to_save_have_a_group_of_their_own_at_the_plain_rate(policy):
    model = adapt(nested(), modules_to_save=["head"])
    group = groups_of(create_lotra_optimizer(model, torch.optim.SGD, lr=1e-2, policy=policy))["other"]
    assert group["lr"] == 1e-2
    assert sorted(tuple(parameter.shape) for parameter in group["params"]) == [(2,), (2, 5)]


def test_weight_decay_and_other_arguments_reach_every_group():
    optimizer = create_lotra_optimizer(wide(), torch.optim.AdamW, lr=1e-2, weight_decay=0.3, betas=(0.5, 0.6))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}
    groups_of(optimizer)["core"]["weight_decay"] = 0.0
    assert groups_of(optimizer)["factor_basis"]["weight_decay"] == 0.3


def test_only_the_active_adapter_is_trained():
    model = get_peft_model(KAN([32, 8]), LoTRAConfig(r=2), adapter_name="first")
    model.add_adapter("second", LoTRAConfig(r=3))
    for active in ("first", "second"):
        model.set_adapter(active)
        table = lotra_lr_multipliers(model)
        assert [line.adapter for line in table] == 4 * [active]
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
        before = copy.deepcopy(model.state_dict())
        model(torch.rand(5, 32)).square().sum().backward()
        optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and all(name.endswith(active) for name in changed)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Rprop"])
def test_optimizers_of_torch(name):
    model = wide()
    optimizer = create_lotra_optimizer(model, getattr(torch.optim, name), lr=1e-2)
    x = torch.rand(32, 64)
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_step_of_adam_has_the_size_of_the_table():
    model = wide()
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    for layer in lotra_layers(model).values():
        nn.init.normal_(layer.lotra_factor_out["default"])
    table = lotra_lr_multipliers(model)
    before = [line.parameter.detach().clone() for line in table]
    model(torch.rand(32, 64)).square().sum().backward()
    optimizer.step()
    for line, old in zip(table, before, strict=True):
        step = (line.parameter - old).abs().max().item()
        assert step == pytest.approx(1e-2 * line.multiplier, rel=1e-3)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_trainer(tmp_path, optimizer_cls):
    model = get_peft_model(KANModel(KANConfig(widths=(3, 32, 2), problem_type="regression")), LoTRAConfig(r=2))
    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=1e-2)
    rates = [group["lr"] for group in optimizer.param_groups]
    inputs = torch.randn(16, 3)
    data = [{"inputs": x, "labels": x[:2]} for x in inputs]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to=[], use_cpu=True
    )
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert any("factor_out" in name and bool(tensor.any()) for name, tensor in model.state_dict().items())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if "lotra_" not in name)
    # the linear schedule of the trainer has taken each group from its own rate to 0
    assert [group["initial_lr"] for group in optimizer.param_groups] == rates
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def qkan_network() -> nn.Module:
    return nn.Sequential(FAMILIES["efficient-kan"](3, 64), FAMILIES["efficient-kan"](64, 2))


def pykan_network() -> nn.Module:
    kan = pytest.importorskip("kan")
    return kan.KAN(width=[3, 64, 2], grid=3, k=3, auto_save=False, symbolic_enabled=False)


@pytest.mark.parametrize("network", [qkan_network, pykan_network])
def test_other_libraries(network):
    model = get_peft_model(network(), LoTRAConfig(r=2))
    table = lotra_lr_multipliers(model)
    assert [line.multiplier for line in table] == [1, 0.5, 1, 1, 1, 1, 0.5, 1]
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
    x = torch.rand(64, 3) * 2 - 1
    y = torch.sin(3 * x[:, :2])
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_one_rate_serves_a_narrow_and_a_wide_network():
    """What the rule is for: at the rate that is good at width 16, a wide network is better off than by one rate."""

    def final_loss(width: int, policy: str) -> float:
        torch.manual_seed(0)
        base = KAN([width] * 3)
        teacher = copy.deepcopy(base)
        with torch.no_grad():
            for layer in teacher.layers:
                update = torch.einsum("or,ir,kr->oik", *(torch.randn(n, 3) for n in layer.spline_weight.shape))
                layer.spline_weight += update * layer.spline_weight.norm() / update.norm()
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=4))
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2, policy=policy)
        errors = []
        for _ in range(200):
            x = torch.rand(128, width) * 2 - 1
            with torch.no_grad():
                y, start = teacher(x), base(x)
            loss = (model(x) - y).square().mean() / (start - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            errors.append(loss.item())
        return sum(errors[-20:]) / 20

    assert final_loss(16, "width") < 0.1
    assert final_loss(256, "width") < 0.85 * final_loss(256, "uniform")


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, math.inf, "0.1", None])
def test_bad_rates(lr):
    with pytest.raises(ValueError, match=r"`lr` is .*finite number above 0"):
        create_lotra_optimizer(wide(), torch.optim.Adam, lr=lr)


@pytest.mark.parametrize("policy", ["wide", None, 3, ["core"]])
def test_unknown_policies(policy):
    with pytest.raises(ValueError, match='`policy` is .*"width", "uniform".*factor_basis'):
        create_lotra_optimizer(wide(), torch.optim.Adam, lr=1e-2, policy=policy)


def test_unknown_components():
    with pytest.raises(ValueError, match="'factor_up', .* the components are .*'factor_basis'"):
        create_lotra_optimizer(wide(), torch.optim.Adam, lr=1e-2, policy={"core": 1, "factor_up": 2})


@pytest.mark.parametrize("multiplier", [-1, math.nan, math.inf, "1", None])
def test_bad_multipliers(multiplier):
    with pytest.raises(ValueError, match="multiplier .* for 'core'"):
        create_lotra_optimizer(wide(), torch.optim.Adam, lr=1e-2, policy={"core": multiplier})


def test_unknown_rules():
    with pytest.raises(ValueError, match="`rule` is 'adam'.*adaptive"):
        create_lotra_optimizer(wide(), torch.optim.Adam, lr=1e-2, rule="adam")


def test_models_without_adapters():
    with pytest.raises(ValueError, match="KAN requires a gradient.*get_peft_model"):
        create_lotra_optimizer(KAN([2, 3]), torch.optim.Adam, lr=1e-2)


def test_models_whose_adapters_are_frozen():
    model = get_peft_model(KAN([2, 3]), LoTRAConfig(r=2, inference_mode=True))
    with pytest.raises(ValueError, match="is_trainable=True"):
        create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
