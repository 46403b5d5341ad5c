# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapted models under torch.func, repeated differentiation, copies, torch.compile and torch.export."""

import copy
import io
import pickle

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart, layers, net, same, state
from helpers import components
from stand_ins import FAMILIES, as_model
from torch.func import functional_call, grad, jacrev, vmap


XD = X.double() + 0.01
PARTS = ("lotra_core", "lotra_factor_out", "lotra_factor_in", "lotra_factor_basis")
kinds = pytest.mark.parametrize("kind", ["own", "efficient-kan", "fast-kan", "cheby-kan"])


@kinds
def test_transforms(kind):
    model, other = adapted(KINDS[kind]().double()), adapted(KINDS[kind]().double())
    assert apart(functional_call(model, dict(other.named_parameters()), (XD,)), other(XD)) < 1e-12
    assert apart(vmap(lambda x: model(x[None])[0])(XD), model(XD)) < 1e-12
    expected = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), XD).permute(1, 0, 2)
    assert apart(vmap(jacrev(lambda x: model(x[None])[0]))(XD), expected) < 1e-12
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(tensors, x):
        return functional_call(model, tensors, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, XD)
    model(XD).square().sum().backward()
    for name in parameters:
        torch.testing.assert_close(found[name].sum(0), model.get_parameter(name).grad)


@kinds
def test_twice_backward(kind):
    model = adapted(as_model(FAMILIES[kind](2, 2)).double(), r=2)
    names, values = zip(*components(model), strict=True)

    def function(x, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    arguments = (XD[:2, :2].clone().requires_grad_(), *(value.detach().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@kinds
def test_a_loss_on_derivatives_trains_the_adapter(kind):
    """As a PINN does it: the loss is made of the second derivatives by the input."""
    model, x = adapted(KINDS[kind]().double()), XD.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x, create_graph=True)[0].square().mean().backward()
    for name, parameter in components(model):
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@kinds
def test_hooks_of_the_base_layers_see_the_adapted_output(kind):
    model = adapted(KINDS[kind]().double())
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda module, args, y: y.square())
    torch.testing.assert_close(vmap(lambda row: model(row[None])[0])(XD), model(XD))


def test_derivatives_in_forward_mode():
    model, direction = adapted().double(), torch.randn_like(XD)
    _, forward = torch.func.jvp(model, (XD,), (direction,))
    _, backward = torch.autograd.functional.jvp(model, XD, direction)
    torch.testing.assert_close(forward, backward)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(way, merged):
    model = adapted()
    add(model, "other")
    if merged:
        model.merge_adapter()
    other, y = way(model), model(X)
    assert same(state(other), state(model)) and torch.equal(other(X), y)
    other.unload().kan.layers[0].spline_weight.data.add_(1)
    assert torch.equal(model(X), y)


def test_state_dict():
    model, other = adapted(), adapted(net(seed=8))
    prefix, names = "base_model.model.kan.layers", set(model.state_dict())
    expected = {f"{prefix}.{i}.{part}.default" for i in (0, 1) for part in PARTS}
    expected.remove(f"{prefix}.0.lotra_factor_in.default")  # all three inputs
    assert {name for name in names if "lotra_" in name} == expected
    assert f"{prefix}.0.base_layer.spline_weight" in names and not torch.equal(model(X), other(X))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(X), other(X))


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "cheby-kan"])
def test_forward_and_backward(kind, training):
    model = adapted(KINDS[kind]()).train(training)
    found = []
    for run in (model, compiled(model)):
        y = run(X)
        y.square().sum().backward()
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lotra_" not in name)
        found.append([y.detach(), *(parameter.grad for _, parameter in components(model))])
        model.zero_grad()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["own", "cheby-kan"])  # efficient-kan's own code checks shapes
def test_exported_and_merged(kind):
    model = adapted(KINDS[kind]())
    y = model(X)
    assert apart(torch.export.export(model, (X,)).module()(X), y) < 1e-5
    assert apart(compiled(model.merge_and_unload())(X), y) < 1e-5


@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
def test_dropout_is_drawn_at_each_step(name):
    run = compiled(adapted(**{name: 0.5}).train())
    results = torch.stack([run(X) for _ in range(20)])
    assert len(results.detach().flatten(1).mul(1e4).round().unique(dim=0)) > 1


def test_another_adapter_after_compiling():
    model = adapted()
    add(model, "other")
    run = compiled(model)
    first = run(X)
    model.set_adapter("other")
    assert apart(run(X), model(X)) < 1e-5 < apart(run(X), first)
