# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Starts of adapters from the gradient of the base's coefficients."""

import copy

import pytest
import torch
from helpers import (
    X,
    adapt,
    assert_near,
    assert_same,
    base,
    layer_of,
    lotra_layers,
    nested,
    refused,
    relative,
    snapshot,
    train,
)
from peft import get_peft_model, inject_adapter_in_model
from stand_ins import LAYER_KINDS
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, start_from_gradient
from peft_lotra.kan import KAN, KANLinear


def batches_for(model):
    """Two batches whose targets no function of few directions explains; the same at each call."""
    generator, like = torch.Generator().manual_seed(7), next(model.parameters())
    data = [torch.rand(5, 3, generator=generator).to(like) * 1.6 - 0.8 for _ in range(2)]
    noise = [torch.randn(5, 9, generator=generator).to(like) for _ in range(2)]
    return list(zip(data, noise, strict=True))


def loss_of(model, batch):
    y = model(batch[0])
    return (y - batch[1][:, : y.shape[-1]]).square().mean()


def train_step_for(model):
    def train_step():
        for batch in batches_for(model):
            loss_of(model, batch).backward()

    return train_step


def gradients_of(model):
    """The summed gradients (out, in, basis [+ 1]) of the layers, by slopes of the loss along their coefficients."""
    twin, gradients = adapt(copy.deepcopy(model), init_weights=True), {}
    train_step = train_step_for(twin)
    for name, layer in lotra_layers(twin.base_model.model).items():
        weight = layer.get_base_weight().clone().requires_grad_()
        parts = layer.lotra_tensor.split(weight)
        hook = layer.register_forward_hook(
            lambda module, args, output, parts=parts: torch.func.functional_call(module.base_layer, parts, args)
        )
        train_step()
        hook.remove()
        gradients[name] = weight.grad
    return gradients


def adapt_by_gradient(model, r=(2, 2, 3)):
    model = get_peft_model(model, LoTRAConfig(r=r))
    start_from_gradient(model, lambda batch: loss_of(model, batch), batches_for(model))
    return model


def directions(layer, adapter="default"):
    """(in basis, ro): what factor_out weighs for each output."""
    return layer.get_components(adapter)._replace(factor_out=None).dense().flatten(1).T


def leading(tensor, mode, rank):
    """The leading left singular vectors of an unfolding."""
    return torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False).U[:, :rank]


def leading_directions(tensor, rank):
    """(in basis, rank): the leading right singular vectors of the unfolding (out, in basis)."""
    return torch.linalg.svd(tensor.flatten(1), full_matrices=False).Vh[:rank].T


def assert_spans(columns, expected):
    projectors = [part @ torch.linalg.pinv(part) for part in (columns, expected)]
    assert_close(*projectors, rtol=0, atol=1e-5)


def everything(model):
    """The state of a model, and its gradients, hooks and modes."""
    return snapshot(model), {
        "grad": {name: (id(p.grad), p.grad is None or p.grad.tolist()) for name, p in model.named_parameters()},
        "hooks": {n: len(p._post_accumulate_grad_hooks or ()) for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
    }


def assert_unchanged(model, before):
    assert everything(model)[1] == before[1]
    assert_same(model, before[0])


def with_batch_norm():
    """A frozen and a trainable layer besides the targets, running statistics, and gradients from before."""
    model = nn.Sequential(nn.BatchNorm1d(3), KANLinear(3, 4), nn.Dropout(0.1), KANLinear(4, 4), nn.Linear(4, 2))
    train_step_for(model)()
    model[4].requires_grad_(False)
    model[1].base_weight.requires_grad_(False)
    model[3].zero_grad()
    model[2].eval()
    return model


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_directions_are_the_leading_ones_and_of_equal_weight(kind):
    model, x = base(kind, torch.float64), X.double()
    (gradient,), y = gradients_of(model).values(), model(x)
    size = gradient.shape[2]  # factor_basis has columns of norm sqrt(basis)
    for mode, ranks, weight in ((1, (99, 2, 99), 1), (2, (99, 99, 2), size)):
        # with the other two ranks full, the best approximation is the truncated singular value decomposition
        (layer,) = lotra_layers(adapt_by_gradient(copy.deepcopy(model), r=ranks)).values()
        columns = layer.get_components("default")[1 + mode]
        gram = columns.T @ columns
        assert_close(gram, weight * torch.eye(2).to(gram), rtol=0, atol=1e-5)
        assert_spans(columns, leading(gradient, mode, 2))
    tuned = adapt_by_gradient(model, r=(2, 99, 99))
    layer = layer_of(tuned)
    columns = directions(layer)

    assert_close(columns.T @ columns, size * torch.eye(2).to(columns), rtol=0, atol=1e-5)
    assert_spans(columns, leading_directions(gradient, 2))
    # it starts as its base, and the first step moves it: a zero factor still has a gradient
    assert_near(tuned(x), y, 1e-12)
    assert not layer.lotra_factor_out["default"].any()

    tuned(x).square().sum().backward()

    assert layer.lotra_factor_out["default"].grad.any()


def test_all_layers_of_a_model_get_their_own():
    model = nested().double()
    gradients = gradients_of(model)
    adapted = lotra_layers(adapt_by_gradient(model, r=(1, 99, 99)).base_model.model)

    assert list(adapted) == list(gradients) == ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]
    for name, gradient in gradients.items():
        assert_spans(directions(adapted[name]), leading_directions(gradient, 1))


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, RuntimeError])
def test_modes_gradients_and_running_statistics_are_left_as_they_were(failure):
    model = adapt(with_batch_norm())
    parameters, state = everything(model)[1], snapshot(model)

    def loss():
        model.train(not model.training)
        value = loss_of(model, batches_for(model)[0])
        if failure is not None:
            raise failure
        return value

    if failure is None:
        start_from_gradient(model, loss)
    else:
        with pytest.raises(failure):
            start_from_gradient(model, loss)
        assert_same(model, state)
    assert everything(model)[1] == parameters


def test_a_second_adapter_starts_from_the_gradient_of_the_base():
    model = base("own", torch.float64)
    (gradient,) = gradients_of(model).values()
    model = adapt(model)  # which changes the outputs
    model.add_adapter("second", LoTRAConfig(r=(2, 99, 99)))
    model.set_adapter("second")

    start_from_gradient(model, lambda batch: loss_of(model, batch), batches_for(model))

    layer = layer_of(model)
    assert_spans(directions(layer, "second"), leading_directions(gradient, 2))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_a_trained_adapter_starts_as_a_new_one(kind):
    model, x = base(kind, torch.float64), X.double()
    y = model(x).detach()
    expected = adapt_by_gradient(copy.deepcopy(model))
    tuned = adapt(model, r=(2, 2, 3))

    assert relative(tuned(x), y) > 1e-3

    before = everything(tuned)[1]
    start_from_gradient(tuned, lambda batch: loss_of(tuned, batch), batches_for(tuned))

    assert_close(tuned(x), y)
    assert everything(tuned)[1] == before
    for new, old in zip(lotra_layers(tuned).values(), lotra_layers(expected).values(), strict=True):
        assert_close(new.get_components("default")._asdict(), old.get_components("default")._asdict())


WRAPPERS = {
    "own module": lambda kan: nn.Sequential(adapt(kan)),
    "injected": lambda kan: inject_adapter_in_model(LoTRAConfig(r=2), kan),
    "half": lambda kan: adapt(kan.bfloat16()),
    "compiled": lambda kan: torch.compile(adapt(kan), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_start_finds_the_adapter_wherever_it_is(kind, mode):
    kan = KAN([3, 4, 3])
    model = WRAPPERS[kind](kan)
    batch = [part.bfloat16() if kind == "half" else part for part in batches_for(kan)[0]]
    with mode():
        start_from_gradient(model, lambda: loss_of(model, batch))

    for layer in lotra_layers(model).values():
        assert not layer.lotra_factor_out["default"].any()
        assert layer.lotra_core["default"].any()

    loss_of(model, batch).backward()


def test_a_config_serves_again_after_a_start():
    config, base_model = LoTRAConfig(r=2), KAN([3, 4, 2])
    model = get_peft_model(copy.deepcopy(base_model), config)
    start_from_gradient(model, lambda: model(X).square().sum())
    get_peft_model(base_model, config)


def two_active(model):
    model.add_adapter("second", LoTRAConfig(r=2))
    model.base_model.set_adapter(["default", "second"])


BAD = {
    "none": (lambda m: m.unload(), lambda m: m(X).sum(), "none is active.*get_peft_model"),
    "two": (two_active, lambda m: m(X).sum(), "default.*second.*set_adapter"),
    "merged": (lambda m: m.merge_adapter(), lambda m: m(X).sum(), "unmerge_adapter"),
    "detached": (None, lambda m: m(X).detach().sum(), "tensor of one value with a gradient"),
    "backward": (None, lambda m: m(X).sum().backward(), "not None.*leave `backward"),
    "many values": (None, lambda m: m(X).sum(0), "of one value"),
    "elsewhere": (None, lambda m: m.base_model.model[3](torch.rand(5, 4)).sum(), "gradient of `1` is missing"),
    "nan": (None, lambda m: m(X).sum() * torch.nan, "not finite"),
    "flat": (None, lambda m: m(X).sum() * 0, "zero"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_adapter_that_cannot_start_is_as_before(kind):
    prepare, loss, words = BAD[kind]
    model = adapt(with_batch_norm())
    if prepare is not None:
        model = prepare(model) or model
    before = everything(model)

    with refused(words):
        start_from_gradient(model, lambda: loss(model))
    assert_unchanged(model, before)


def test_a_value_no_batches_or_a_moved_grid_is_refused():
    model = adapt(KAN([3, 4, 2]))
    before = everything(model)

    with pytest.raises(TypeError, match="`loss`"):
        start_from_gradient(model, model(X).sum())
    with refused("is missing"):
        start_from_gradient(model, lambda batch: model(batch).sum(), [])
    assert_unchanged(model, before)

    lotra_layers(model)["base_model.model.layers.0"].base_layer.update_grid(X)

    with pytest.raises(RuntimeError, match="grid"):
        start_from_gradient(model, lambda: model(X).sum())


def test_the_first_steps_reduce_the_loss_of_a_shifted_task_more_than_with_random_factors():
    points = torch.rand(256, 4) * 2 - 1
    weights = torch.tensor([[1.0, 0.5, -1.0, 0.3], [0.2, -0.7, 0.6, 1.0], [-0.5, 0.9, 0.1, -0.8]])

    def target(shift):
        return torch.sin(torch.pi * (points + shift)) @ weights.T

    def loss_of(model):
        return (model(points) - target(0.15)).square().mean()

    kan = train(KAN([4, 12, 3]), points, target(0.0), 150, 0.02)
    losses = {}
    for start in ("gradient", "random"):
        model = get_peft_model(copy.deepcopy(kan), LoTRAConfig(r=(2, 2, 2)))
        if start == "gradient":
            start_from_gradient(model, lambda m=model: loss_of(m))
        losses[start] = loss_of(train(model, points, target(0.15), 20, 0.02)).item()

    assert losses["gradient"] < 0.8 * min(losses["random"], loss_of(kan).item())
