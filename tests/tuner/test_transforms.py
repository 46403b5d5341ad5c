# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapted models under torch.compile, torch.func and repeated differentiation."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, base, components, inputs, lotra_layers
from torch.func import functional_call, vmap

from peft_lotra.kan import KAN


both_kans = pytest.mark.parametrize("family", ["own", "efficient-kan"])


def in_one_graph(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@both_kans
@pytest.mark.parametrize("training", [False, True])
def test_compiled_forward_and_backward(family, training):
    model = adapt(base(family)).train(training)
    x = inputs()
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in components(model)}
    model.zero_grad()
    y = in_one_graph(model)(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for name, parameter in components(model):
        torch.testing.assert_close(parameter.grad, gradients[name])
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lotra_" not in name)


@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
def test_compiled_dropout_is_drawn_at_each_step(name):
    model = adapt(base("own"), **{name: 0.5}).train()
    compiled = in_one_graph(model)
    x = inputs(2)
    results = torch.stack([compiled(x) for _ in range(20)])
    assert len(results.detach().flatten(1).mul(1e4).round().unique(dim=0)) > 1


@both_kans
def test_double_backward(family):
    model = adapt(base(family, torch.float64), r=2)
    x = inputs(3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)


@both_kans
def test_double_backward_in_the_components(family):
    model = adapt(base(family, torch.float64, 2, 2), r=2)
    names, values = zip(*components(model), strict=True)
    x = inputs(2, torch.float64, 2)

    def function(x, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    arguments = (x.requires_grad_(), *(value.detach().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@both_kans
def test_a_loss_on_derivatives_trains_the_adapter(family):
    """As a PINN does it: the loss is made of the second derivatives by the input."""
    model = adapt(base(family, torch.float64))
    x = inputs(8, torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    second.square().mean().backward()
    for name, parameter in components(model):
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@both_kans
def test_hooks_of_the_base_layers_see_the_adapted_output(family):
    model = adapt(base(family, torch.float64)).eval()
    for layer in lotra_layers(model).values():
        layer.base_layer.register_forward_hook(lambda module, args, y: y.square())
    x = inputs(7, torch.float64)
    torch.testing.assert_close(vmap(lambda row: model(row[None])[0])(x), model(x))


def test_derivatives_in_forward_mode():
    model = adapt(KAN([3, 4, 2], dtype=torch.float64))
    x, direction = inputs(4, torch.float64), inputs(4, torch.float64)
    _, forward = torch.func.jvp(model, (x,), (direction,))
    _, backward = torch.autograd.functional.jvp(model, x, direction)
    torch.testing.assert_close(forward, backward)
