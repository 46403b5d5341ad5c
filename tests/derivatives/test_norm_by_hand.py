# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_lotra.derivatives import norms
from peft_lotra.derivatives.norm_by_hand import LayerNormJet


DIRECTIONS, FEATURES, POINTS = 3, 5, 70


def jets(weights, has_second, lead=(POINTS,), constant=False, affine=True):
    """The arguments of `through_norm`."""
    norm = nn.LayerNorm(FEATURES, elementwise_affine=affine, dtype=torch.float64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    z = torch.randn(*lead, FEATURES, dtype=torch.float64, requires_grad=True)
    rows = tuple(1 for _ in lead) if constant else lead
    first = torch.randn(DIRECTIONS, *rows, FEATURES, dtype=torch.float64, requires_grad=True)
    second = torch.randn(DIRECTIONS if weights is None else 1, *lead, FEATURES, dtype=torch.float64).requires_grad_()
    return norm, z, first, second if has_second else None, weights


def plain(norm, z, first, second, weights):
    y, dy, d2y = norms._normalize(norm.eps, weights, z, first, second, norm.weight)
    return (y if norm.bias is None else y + norm.bias), dy, d2y


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operation by hand."""
    found = []

    class Counted(LayerNormJet):
        @staticmethod
        def forward(*args):
            found.append(1)
            return LayerNormJet.forward(*args)

    monkeypatch.setattr(norms, "LayerNormJet", Counted)
    return found


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)], ids=["each", "sum"])
@pytest.mark.parametrize("has_second", [False, True])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (2,), (1,), (0,)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"constant": True}, {"lead": (7, 10)}, {"lead": (7, 10), "constant": True}],
    ids=str,
)
def test_values_and_two_derivatives_are_those_of_plain_operations(calls, weights, has_second, wanted, options):
    torch.manual_seed(0)
    arguments = jets(weights, has_second, **options)
    inputs = [part for part in (*arguments[1:4], *arguments[0].parameters()) if part is not None]
    results = [norms.through_norm(*arguments), plain(*arguments)]
    assert calls
    torch.testing.assert_close(*results)

    def gradients(of, **kwargs):
        total = sum(of(*arguments)[index].pow(3).sum() for index in wanted)
        return torch.autograd.grad(total, inputs, materialize_grads=True, **kwargs)

    torch.testing.assert_close(gradients(norms.through_norm), gradients(plain))
    squares = [
        sum(part.square().sum() for part in gradients(of, create_graph=True)) for of in (norms.through_norm, plain)
    ]
    torch.testing.assert_close(*(torch.autograd.grad(total, inputs, materialize_grads=True) for total in squares))


def test_transforms_and_few_points_take_plain_operations(calls):
    norm, z, first, second, weights = jets(None, True)
    norms.through_norm(norm, z[:5], first[:, :5], second[:, :5], weights)
    torch.func.vmap(lambda x: norms.through_norm(norm, x.unsqueeze(0), first[:, :1], second[:, :1], weights)[0])(z)
    assert not calls


def test_inputs_are_not_written():
    arguments = jets(None, True)
    before = [part.detach().clone() for part in arguments[1:4]]
    y, dy, d2y = norms.through_norm(*arguments)
    (y.sum() + dy.square().sum() + d2y.square().sum()).backward()
    torch.testing.assert_close([part.detach() for part in arguments[1:4]], before, rtol=0, atol=0)
