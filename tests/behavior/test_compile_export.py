# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Compiled and exported models compute the same."""

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart
from helpers import components


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
