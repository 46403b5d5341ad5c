# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`init_weights="gradient"`: factors from the gradient that `preprocess_lotra` gathers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, relative, snapshot
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, preprocess_lotra
from peft_lotra.kan import KAN, KANLinear, SlimKAN


every_family = pytest.mark.parametrize("family", FAMILIES)


def gradient_config(**kwargs: Any) -> LoTRAConfig:
    return LoTRAConfig(**{"r": (2, 2, 3), "init_weights": "gradient", **kwargs})


def train_step_for(model: nn.Module, batches: int = 2, rows: int = 5, in_features: int = 3) -> Callable[[], None]:
    """Some batches whose targets no function of few directions explains; the same at each call."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    data = [torch.rand(rows, in_features, generator=generator).to(dtype) * 1.6 - 0.8 for _ in range(batches)]
    noise = [torch.randn(rows, 9, generator=generator).to(dtype) for _ in range(batches)]

    def train_step() -> None:
        for x, target in zip(data, noise, strict=True):
            y = model(x)
            (y - target[:, : y.shape[-1]]).square().mean().backward()

    return train_step


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The summed gradients (out, in, basis [+ 1]) of the layers, by slopes of the loss along their coefficients."""
    twin = adapt(copy.deepcopy(model), random=False)
    train_step = train_step_for(twin)
    found = {}
    for name, layer in lotra_layers(twin.base_model.model).items():
        weight = layer.get_base_weight().clone().requires_grad_()
        parts = layer.lotra_tensor.split(weight)
        hook = layer.register_forward_hook(
            lambda module, args, output, parts=parts: torch.func.functional_call(module.base_layer, parts, args)
        )
        train_step()
        hook.remove()
        found[name] = weight.grad
    return found


def gradient_of(model: nn.Module) -> Tensor:
    (gradient,) = gradients_of(model).values()
    return gradient


def adapt_by_gradient(model: nn.Module, **kwargs: Any) -> PeftModel:
    config = gradient_config(**kwargs)
    preprocess_lotra(model, config, train_step_for(model))
    return get_peft_model(model, config)


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


def directions(layer: nn.Module, adapter: str = "default") -> Tensor:
    """(in basis, ro): what factor_out weighs for each output."""
    core, _, factor_in, factor_basis = layer.get_components(adapter)
    return torch.einsum("abc,ib,kc->aik", core, factor_in, factor_basis).flatten(1).T


def leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors of an unfolding."""
    return torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False).U[:, :rank]


def leading_directions(tensor: Tensor, rank: int) -> Tensor:
    """(in basis, rank): the leading right singular vectors of the unfolding (out, in basis)."""
    return torch.linalg.svd(tensor.flatten(1), full_matrices=False).Vh[:rank].T


def assert_spans(columns: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(projector(columns), projector(expected), rtol=0, atol=1e-6)


def everything(model: nn.Module) -> dict[str, Any]:
    """The state of a model, with its gradients, hooks and modes."""
    return {
        **snapshot(model),
        "grad": {name: (id(p.grad), p.grad is None or p.grad.tolist()) for name, p in model.named_parameters()},
        "hooks": {n: len(p._post_accumulate_grad_hooks or ()) for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything(model)
    for key in ("grad", "hooks", "modes"):
        assert after[key] == before[key], key
    assert_same(model, {key: before[key] for key in snapshot(model)})


def with_batch_norm() -> nn.Module:
    """A frozen and a trainable layer besides the targets, running statistics, and gradients from before."""
    model = nn.Sequential(nn.BatchNorm1d(3), KANLinear(3, 4), nn.Dropout(0.1), KANLinear(4, 4), nn.Linear(4, 2))
    train_step_for(model)()
    model[4].requires_grad_(False)
    model[1].base_weight.requires_grad_(False)
    model[3].zero_grad()
    model[2].eval()
    return model


@every_family
def test_factors_span_the_leading_singular_vectors_of_the_gradient(family):
    model = base(family, torch.float64)
    gradient = gradient_of(model)
    for mode, factor in ((1, "lotra_factor_in"), (2, "lotra_factor_basis")):
        # with the other two ranks full, the best approximation is the truncated singular value decomposition
        ranks = tuple(2 if i == mode else 99 for i in range(3))
        (layer,) = lotra_layers(adapt_by_gradient(copy.deepcopy(model), r=ranks)).values()
        columns = getattr(layer, factor)["default"]
        gram = columns.T @ columns
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(2).to(gram), rtol=0, atol=1e-6)
        assert_spans(columns, leading(gradient, mode, 2))


@every_family
def test_the_directions_are_the_leading_ones_and_of_equal_weight(family):
    model, x = base(family, torch.float64), inputs(dtype=torch.float64)
    gradient, y = gradient_of(model), model(x)
    adapted = adapt_by_gradient(model, r=(2, 99, 99))
    (layer,) = lotra_layers(adapted).values()
    columns = directions(layer)
    size = gradient.shape[2]  # factor_basis has columns of norm sqrt(basis)
    torch.testing.assert_close(columns.T @ columns, size * torch.eye(2).to(columns), rtol=0, atol=1e-6)
    assert_spans(columns, leading_directions(gradient, 2))
    # it starts as its base, and the first step moves it: a zero factor still has a gradient
    assert relative(adapted(x), y) < 1e-12 and not layer.lotra_factor_out["default"].any()
    adapted(x).square().sum().backward()
    assert layer.lotra_factor_out["default"].grad.any()


def test_all_layers_of_a_model_get_their_own():
    model = nested().double()
    gradients = gradients_of(model)
    layers = lotra_layers(adapt_by_gradient(model, r=(1, 99, 99)).base_model.model)
    assert list(layers) == list(gradients) == ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]
    for name, gradient in gradients.items():
        assert_spans(directions(layers[name]), leading_directions(gradient, 1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gathered_in_any_mode(mode):
    model, x = KAN([3, 4, 2]), inputs()
    with mode():
        preprocess_lotra(model, gradient_config(), lambda: model(x).square().sum().backward())
    get_peft_model(model, gradient_config())(x).sum().backward()


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, RuntimeError, "no backward", "nan"])
def test_the_base_is_left_as_it_was(failure):
    model, config = with_batch_norm(), gradient_config()
    before, inner = everything(model), train_step_for(model)

    def train_step():
        if failure == "no backward":
            return model(inputs())
        if failure == "nan":
            return (model(inputs()).sum() * torch.nan).backward()
        model.train(not model.training)
        model[4].requires_grad_(True)
        inner()
        model[0](inputs())
        if failure is not None:
            raise failure

    if failure is None:
        preprocess_lotra(model, config, train_step)
    else:
        with pytest.raises(ValueError if isinstance(failure, str) else failure):
            preprocess_lotra(model, config, train_step)
    assert_unchanged(model, before)
    if failure is not None:  # nothing was kept
        with pytest.raises(ValueError, match="preprocess_lotra"):
            get_peft_model(model, config)
        assert_unchanged(model, before)


def test_a_layer_that_gets_no_gradient_is_named():
    model = with_batch_norm()
    step = lambda: model[3](inputs(in_features=4)).sum().backward()  # noqa: E731
    with pytest.raises(ValueError, match=r"No gradient arrived at \['spline_weight', 'base_weight'\] of `1`"):
        preprocess_lotra(model, gradient_config(), step)
    with pytest.raises(ValueError, match="preprocess_lotra"):  # that of the other layer is not kept either
        get_peft_model(model, gradient_config(target_modules=["3"]))


@pytest.mark.parametrize("target", [["4"], "all-linear"])
def test_a_wrong_target_is_refused_before_the_step(target):
    model = with_batch_norm()
    before = everything(model)
    with pytest.raises(ValueError, match="not a KAN layer|all-linear"):
        preprocess_lotra(model, gradient_config(target_modules=target), lambda: pytest.fail("called"))
    for init_weights in (True, False, "hosvd"):
        with pytest.raises(ValueError, match="(?s)`init_weights`.*gradient"):
            preprocess_lotra(model, LoTRAConfig(init_weights=init_weights), lambda: pytest.fail("called"))
    assert_unchanged(model, before)


@pytest.mark.parametrize("used_by", ["gradient", True])
def test_the_gradient_is_used_up_by_an_adapter(used_by):
    model = base("own")
    preprocess_lotra(model, gradient_config(), train_step_for(model))
    model = get_peft_model(model, gradient_config(init_weights=used_by)).unload()
    before = everything(model)
    with pytest.raises(ValueError, match="preprocess_lotra"):
        get_peft_model(model, gradient_config())
    assert_unchanged(model, before)


def test_a_second_adapter_on_a_peft_model():
    model = base("own", torch.float64)
    gradient = gradient_of(model)
    adapted = adapt(model, random=False)  # changes nothing yet: the gradient is that of the base
    before = everything(adapted)
    config = gradient_config(r=(2, 99, 99))
    preprocess_lotra(adapted, config, train_step_for(adapted))
    assert_unchanged(adapted, before)
    adapted.add_adapter("second", config)
    (layer,) = lotra_layers(adapted).values()
    assert_spans(directions(layer, "second"), leading_directions(gradient, 2))
    x = inputs(dtype=torch.float64)
    y = adapted(x)
    adapted.set_adapter("second")
    assert torch.equal(adapted(x), y)
    with pytest.raises(ValueError, match="preprocess_lotra"):
        adapted.add_adapter("third", config)
    assert list(adapted.peft_config) == ["default", "second"]


def test_not_while_merged():
    model = get_peft_model(SlimKAN([3, 4, 2], ranks=2), LoTRAConfig(r=2, init_weights=False))
    x, config = torch.rand(5, 3), LoTRAConfig(r=2, init_weights="gradient")
    model.merge_adapter()
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        preprocess_lotra(model, config, lambda: model(x).sum().backward())
    model.unmerge_adapter()
    preprocess_lotra(model, config, lambda: model(x).sum().backward())


def test_the_first_steps_reduce_the_loss_of_a_shifted_task_more_than_with_random_factors():
    def task(shift: float) -> tuple[Tensor, Tensor]:
        x = torch.rand(256, 4) * 2 - 1
        weights = torch.tensor([[1.0, 0.5, -1.0, 0.3], [0.2, -0.7, 0.6, 1.0], [-0.5, 0.9, 0.1, -0.8]])
        return x, torch.sin(torch.pi * (x + shift)) @ weights.T

    def train(model, steps: int, x: Tensor, y: Tensor) -> float:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return (model(x) - y).square().mean().item()

    kan = KAN([4, 12, 3])
    train(kan, 150, *task(0.0))
    x, y = task(0.15)
    losses = {None: (kan(x) - y).square().mean().item()}
    for init_weights in ("gradient", True):
        config, model = LoTRAConfig(r=(2, 2, 2), init_weights=init_weights), copy.deepcopy(kan)
        if init_weights == "gradient":
            preprocess_lotra(model, config, lambda m=model: (m(x) - y).square().mean().backward())
        losses[init_weights] = train(get_peft_model(model, config), 20, x, y)
    assert losses["gradient"] < 0.8 * min(losses[True], losses[None]), losses
