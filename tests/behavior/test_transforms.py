# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapted models under torch.func, copies, casts."""

import copy
import io
import pickle

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart, net, same, state
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
    model, x = adapted(KINDS[kind]().double()), XD.clone().requires_grad_()
    core = next(p for name, p in model.named_parameters() if "lotra_core" in name)

    def square(**kwargs):
        return torch.autograd.grad(model(x).sum(), x, **kwargs)[0].square().sum()

    (found,) = torch.autograd.grad(square(create_graph=True), core)
    core.data[0, 0, 0] += 1e-5
    above = square()
    core.data[0, 0, 0] -= 2e-5
    torch.testing.assert_close(found[0, 0, 0], (above - square()) / 2e-5, rtol=1e-4, atol=1e-6)


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
    assert {name for name in names if "lotra_" in name} == expected
    assert f"{prefix}.0.base_layer.spline_weight" in names and not torch.equal(model(X), other(X))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(X), other(X))
