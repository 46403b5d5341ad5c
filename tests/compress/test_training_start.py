# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Starts of adapters from a few steps of full fine-tuning."""

import copy
import math

import pytest
import torch
from helpers import X, adapt, assert_equal, base, inputs, lotra_layers, refused, state, train
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_training
from peft_lotra.kan import KAN


def target(x):
    return torch.stack([x.prod(1), torch.sin(3 * x[:, 0]), x[:, 1] * x[:, 2]], 1)


def loss_of(model, x):
    y = model(x)
    return (y - target(x)[:, : y.shape[-1]]).square().mean()


def task(widths=(3, 8, 3), **options):
    """An adapted KAN, and inputs of its new task that are correlated, so that the metric of the data matters."""
    torch.manual_seed(0)
    x = torch.rand(60, 3) * 2 - 1
    x[:, 2] = 0.9 * x[:, 1] + 0.1 * x[:, 2]
    return get_peft_model(KAN(list(widths)), LoTRAConfig(**options)), x


def parameters_of(model):
    return sum(p.numel() for name, p in model.named_parameters() if "lotra_" in name)


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "pykan", "fast-kan"])
def test_a_dense_adapter_starts_as_the_fine_tuned_model(kind):
    model = base(kind, torch.float64)
    x = inputs(30, torch.float64)
    tuned = copy.deepcopy(model)
    adapter = get_peft_model(model, LoTRAConfig(r="full"))
    (layer,) = lotra_layers(adapter).values()
    tuned.requires_grad_(False)
    for name in layer.lotra_tensor.parameters:
        tuned.kan.get_parameter(name).requires_grad_()
    train(tuned, x, 0.0, 7, lr=2e-2)

    start_from_training(adapter, lambda: adapter(x).square().mean(), steps=7, lr=2e-2)

    assert_close(adapter(x), tuned(x), rtol=1e-3, atol=1e-4)


def test_the_base_stays_bit_for_bit_and_the_adapted_model_does_not_equal_it():
    model, x = task(r=(4, 3, 2))
    before = state(model)
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    first = loss_of(model, x).item()

    start_from_training(model, lambda: loss_of(model, x))

    assert loss_of(model, x) < 0.3 * first
    for name, value in state(model).items():
        assert "lotra_" in name or torch.equal(before[name], value)
    assert {name: module.training for name, module in model.named_modules()} == modes
    # without a budget, the components are the same parameters
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert all(p.grad is None for p in model.parameters())
    with model.disable_adapter():
        assert_close(loss_of(model, x).item(), first)


def test_a_budget_chooses_ranks_within_it(tmp_path):
    config, kan, (_, x) = LoTRAConfig(budget=0.25), KAN([3, 8, 3]), task()
    model = get_peft_model(copy.deepcopy(kan), config)
    count = 0.25 * sum(layer.spline_weight.numel() + layer.base_weight.numel() for layer in kan.layers)

    start_from_training(model, lambda: loss_of(model, x), steps=10)

    assert count * 0.8 < parameters_of(model) <= count
    pattern = model.peft_config["default"].rank_pattern
    forms = {layer.lotra_name: layer.get_components("default").form for layer in lotra_layers(model).values()}
    assert {key.replace("^", "").replace("\\", ""): form for key, form in pattern.items()} == forms
    assert config.rank_pattern == {}
    assert config.init_weights is True
    # the file loads without data
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(kan), str(tmp_path))
    assert_equal(loaded(x), model(x))
    assert loaded.peft_config["default"].init_weights == "training"


def test_the_budget_of_the_data_beats_the_ranks_by_size():
    chosen, x = task((3, 12, 3), budget=0.14)
    by_size, _ = task((3, 12, 3), rank_pattern=chosen.peft_config["default"].rank_pattern)

    for model in (chosen, by_size):
        start_from_training(model, lambda model=model: loss_of(model, x))

    assert parameters_of(chosen) <= parameters_of(by_size)
    assert loss_of(chosen, x) < loss_of(by_size, x)


def test_the_update_is_truncated_in_the_outputs_of_the_model():
    model, x = task(r=(2, 2, 2))
    plain = copy.deepcopy(model)

    start_from_training(model, lambda: loss_of(model, x))
    # `vmap` hides the calls of the network, and with them its inputs
    start_from_training(plain, lambda: (torch.func.vmap(plain)(x) - target(x)).square().mean())

    assert loss_of(model, x) < 0.9 * loss_of(plain, x)


def test_all_batches_are_passed_over_repeatedly():
    model, x = task(r=2)
    seen = []

    def loss(batch):
        seen.append(batch)
        return loss_of(model, x[10 * batch : 10 * batch + 10])

    start_from_training(model, loss, [0, 1, 2], steps=7)

    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_the_optimizer_moves_each_component_by_a_share_of_its_size():
    model, x = task(r=(4, "full", 2))
    start_from_training(model, lambda: loss_of(model, x), steps=10)

    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)

    for group in optimizer.param_groups:
        (parameter,) = group["params"]
        expected = 3e-2 * parameter.detach().square().mean().sqrt().item()
        assert group["lr"] == pytest.approx(expected)
    uniform = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2, policy="uniform")
    assert {group["lr"] for group in uniform.param_groups} == {3e-2}


def test_alpha_does_not_change_where_an_adapter_starts():
    model, x = task(r=(3, 3, 2))
    start_from_training(model, lambda: loss_of(model, x), steps=10)
    scaled, _ = task(r=(3, 3, 2), alpha=0.25)

    start_from_training(scaled, lambda: loss_of(scaled, x), steps=10)

    assert_close(scaled.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_trained_or_disabled_adapter_starts_from_the_base():
    model, x = task(r=(3, 3, 2))
    start_from_training(model, lambda: loss_of(model, x), steps=10)
    trained, _ = task(r=(3, 3, 2))
    for layer in lotra_layers(trained).values():
        layer.set_components("default", layer.get_components("default").map(torch.ones_like))

    with trained.disable_adapter():
        start_from_training(trained, lambda: loss_of(trained, x), steps=10)

    assert_close(trained(x), model(x), rtol=1e-4, atol=1e-5)


def test_without_the_residual_branch_its_weights_have_no_update():
    model, x = task(r="full", adapt_residual=False)

    start_from_training(model, lambda: loss_of(model, x), steps=10)

    for layer in lotra_layers(model).values():
        assert layer.get_delta_weight("default").shape[2] == 8
        assert layer.get_delta_weight("default").any()
    # it is where training the splines alone leads
    model, x = task(r="full", adapt_residual=False)
    tuned = copy.deepcopy(model).unload()
    for layer in tuned.layers:
        layer.base_weight.requires_grad_(False)
    train(tuned, x, target(x), 3, lr=1e-2)
    start_from_training(model, lambda: loss_of(model, x), steps=3)
    assert_close(model(x), tuned(x), rtol=1e-3, atol=1e-4)


WRAPPERS = {
    "own module": lambda kan: nn.Sequential(adapt(kan)),
    "injected": lambda kan: inject_adapter_in_model(LoTRAConfig(budget=0.5), kan),
    "half": lambda kan: get_peft_model(kan.bfloat16(), LoTRAConfig(budget=0.5)),
    "compiled": lambda kan: torch.compile(adapt(kan), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_start_finds_the_adapter_wherever_it_is(kind, mode):
    model = WRAPPERS[kind](KAN([3, 4, 2]))
    x = X.bfloat16() if kind == "half" else X
    first = loss_of(model, x).item()

    with mode():
        start_from_training(model, lambda: loss_of(model, x), steps=20)

    value = loss_of(model, x)
    assert value < first
    value.backward()
    for layer in lotra_layers(model).values():
        for component in layer.get_components("default")._asdict().values():
            assert component.grad is not None
            assert component.isfinite().all()


def two_active(model):
    model.add_adapter("second", LoTRAConfig(r=2))
    model.base_model.set_adapter(["default", "second"])


def used(model):
    model.optimizers = [torch.optim.Adam(model.parameters())]


def total(model):
    return model(X).sum()


BAD = {
    "none": (lambda m: m.unload(), total, {}, "none is active.*get_peft_model"),
    "two": (two_active, total, {}, "default.*second.*set_adapter"),
    "merged": (lambda m: m.merge_adapter(), total, {}, "unmerge_adapter"),
    "parallel": (nn.DataParallel, total, {}, "wrapped by DataParallel.*before the model is wrapped"),
    "used": (used, total, {}, "optimizer was created before.*`layers.0`.*after `start_from_training`"),
    "many values": (None, lambda m: m(X).sum(0), {}, "of one value"),
    "elsewhere": (None, lambda m: m.base_model.model.layers[1](X[:, :1].expand(-1, 8)).sum(), {}, "`layers.0`"),
    "nan": (None, lambda m: total(m) * math.nan, {}, "not finite"),
    "flat": (None, lambda m: total(m) * 0, {}, "zero"),
    "no batches": (None, total, {"batches": []}, "no more batch"),
    "an iterator": (None, total, {"batches": iter([X, X])}, "no more batch"),
    "no steps": (None, total, {"steps": 0}, "`steps` is 0"),
    "no rate": (None, total, {"lr": -1.0}, "`lr` is -1.0"),
    "inputs of no layer": (None, lambda m: m(X[0]).sum(), {}, "pass a batch"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_adapter_that_cannot_start_is_as_before(kind):
    prepare, loss, options, words = BAD[kind]
    model, _ = task(budget=0.3)
    if prepare is not None:
        model = prepare(model) or model
    config = vars(model).get("peft_config") or getattr(model, "peft_config", None)
    pattern = copy.deepcopy(config["default"].rank_pattern) if config else None

    with refused(words, model):
        start_from_training(model, lambda *batch: loss(model), **{"steps": 3, **options})

    if config:
        assert config["default"].rank_pattern == pattern
        assert config["default"].init_weights is True


def trained_in(model):
    return {name.split("lotra_")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_components_that_are_not_trained_stay_so_when_a_budget_replaces_them():
    """Also components that the adapter had not."""
    model, x = task(widths=(3, 20, 3), budget=0.2, train=["core"])

    start_from_training(model, lambda: loss_of(model, x), steps=5)

    assert any("factor_in.default" in name for name, _ in model.named_parameters())
    assert trained_in(model) == {"core.default"}
    model.set_adapter("default")
    assert trained_in(model) == {"core.default"}


def test_the_outputs_after_a_loss_weigh_the_update():
    """As models of transformers return them, for labels."""
    model, x = task(r=2)
    labeled = copy.deepcopy(model)
    labeled.get_base_model().register_forward_hook(lambda module, args, y: {"loss": y.new_tensor(1.0), "logits": y})

    start_from_training(model, lambda: loss_of(model, x), steps=5)
    start_from_training(labeled, lambda: loss_of(lambda x: labeled(x)["logits"], x), steps=5)

    with torch.no_grad():
        assert_close(labeled(x)["logits"], model(x))


def test_a_deleted_optimizer_does_not_hinder_a_start():
    model, x = task(budget=0.3)
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    del optimizer, scheduler

    start_from_training(model, lambda: loss_of(model, x), steps=2)

    assert model.peft_config["default"].init_weights == "training"
