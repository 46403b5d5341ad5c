# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Compiled and exported models compute the same."""

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "cheby-kan"])
def test_outputs(kind):
    model = adapted(KINDS[kind]())
    y = model(X)
    assert apart(compiled(model)(X), y) < 1e-5
    if kind != "efficient-kan":  # whose own code checks shapes
        assert apart(torch.export.export(model, (X,)).module()(X), y) < 1e-5
    assert apart(compiled(model.merge_and_unload())(X), y) < 1e-5


def test_a_training_step():
    gradients = []
    for wrap in (compiled, lambda model: model):
        torch.manual_seed(1)
        model = adapted().train()
        wrap(model)(X).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 8
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_another_adapter_after_compiling():
    model = adapted()
    add(model, "other")
    run = compiled(model)
    first = run(X)
    model.set_adapter("other")
    assert apart(run(X), model(X)) < 1e-5 < apart(run(X), first)
