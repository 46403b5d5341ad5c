# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapted models under torch.func, repeated differentiation, copies, torch.compile and torch.export."""

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    KINDS,
    X,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    components,
    lotra_layers,
    net,
    relative,
    state,
)
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.testing import assert_close


XD = X.double() + 0.01
PARTS = ("lotra_core", "lotra_factor_out", "lotra_factor_in", "lotra_factor_basis")
kinds = pytest.mark.parametrize("kind", ["own", "efficient-kan", "fast-kan", "cheby-kan"])


@kinds
def test_functional_call_vmap_jacrev_and_grad_see_the_adapter(kind):
    model, other = adapt(KINDS[kind]().double()), adapt(KINDS[kind]().double())
    assert_near(functional_call(model, dict(other.named_parameters()), (XD,)), other(XD), 1e-12)
    assert_near(vmap(lambda x: model(x[None])[0])(XD), model(XD), 1e-12)
    expected = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), XD).permute(1, 0, 2)
    assert_near(vmap(jacrev(lambda x: model(x[None])[0]))(XD), expected, 1e-12)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(tensors, x):
        return functional_call(model, tensors, (x[None],)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, XD)
    model(XD).square().sum().backward()
    for name in parameters:
        assert_close(gradients[name].sum(0), model.get_parameter(name).grad)


@kinds
@pytest.mark.parametrize("r", [1, ("full", "full", 1), "full"])
def test_hessians_are_the_same_in_each_mode_and_in_mixed_batches(kind, r):
    """What one transform computes is not kept for the next."""
    model = adapt(KINDS[kind]().double(), r=r)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    names = tuple(parameters)
    x = XD[:2]
    rows = ["__base__", "default"]

    def loss(*tensors, x=x[1:], **kwargs):
        return functional_call(model, dict(zip(names, tensors, strict=True)), (x,), kwargs)[-1].square().sum()

    positions = tuple(range(len(names)))
    tensors = tuple(parameters.values())
    expected = torch.autograd.functional.hessian(loss, tensors)
    results = [
        torch.autograd.functional.hessian(loss, tensors, vectorize=True),
        hessian(loss, positions)(*tensors),
        hessian(lambda *tensors: loss(*tensors, x=x, adapter_names=rows), positions)(*tensors),
        jacrev(jacrev(lambda *tensors: loss(*tensors, x=x, adapter_names=rows), positions), positions)(*tensors),
    ]

    for result in results:
        assert_close(result, expected)


@kinds
def test_hooks_of_the_base_layers_see_the_adapted_output(kind):
    model = adapt(KINDS[kind]().double())
    for layer in lotra_layers(model).values():
        layer.base_layer.register_forward_hook(lambda module, args, y: y.square())

    assert_close(vmap(lambda row: model(row[None])[0])(XD), model(XD))


def test_derivatives_in_forward_mode_are_those_in_backward_mode():
    model, direction = adapt().double(), torch.randn_like(XD)
    _, forward = torch.func.jvp(model, (XD,), (direction,))
    _, backward = torch.autograd.functional.jvp(model, XD, direction)

    assert_close(forward, backward)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_equals_its_model_and_shares_nothing(way, merged):
    model = adapt()
    add_adapter(model, "other")
    if merged:
        model.merge_adapter()
    copied, y = way(model), model(X)

    assert_equal(state(copied), state(model))
    assert_equal(copied(X), y)

    copied.unload().kan.layers[0].spline_weight.data.add_(1)

    assert_equal(model(X), y)


def test_a_state_dict_has_the_names_of_the_components():
    model, other = adapt(), adapt(net(seed=8))
    prefix, names = "base_model.model.kan.layers", set(model.state_dict())
    expected = {f"{prefix}.{i}.{part}.default" for i in (0, 1) for part in PARTS}
    expected.remove(f"{prefix}.0.lotra_factor_in.default")  # all three inputs

    assert {name for name in names if "lotra_" in name} == expected
    assert f"{prefix}.0.base_layer.spline_weight" in names
    assert not torch.equal(model(X), other(X))

    other.load_state_dict(model.state_dict())

    assert_equal(model(X), other(X))


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "cheby-kan"])
def test_a_compiled_model_has_the_same_outputs_and_gradients(kind, training):
    model = adapt(KINDS[kind]()).train(training)
    results = []
    for run in (model, compiled(model)):
        y = run(X)
        y.square().sum().backward()
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lotra_" not in name)
        results.append([y.detach(), *(parameter.grad for _, parameter in components(model))])
        model.zero_grad()

    assert_close(*results)


def test_a_compiled_model_follows_the_active_adapter():
    model = adapt()
    add_adapter(model, "other")
    run = compiled(model)
    first = run(X)
    model.set_adapter("other")

    assert relative(run(X), model(X)) < 1e-5 < relative(run(X), first)
