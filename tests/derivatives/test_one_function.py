# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from peft_lotra.derivatives.bases import FunctionBasis
from peft_lotra.derivatives.layer_jet import LayerJet
from peft_lotra.derivatives.layers import _by_plain_operations, _function
from peft_lotra.derivatives.one_function import OneFunctionJet
from peft_lotra.kan.basis import silu_derivatives


SILU = FunctionBasis(1, lambda z, highest: [part.unsqueeze(-1) for part in silu_derivatives(z, highest)])


def test_it_is_taken_for_one_function():
    z = torch.rand(2, 100)
    assert _function(SILU, 5, z) is OneFunctionJet
    assert _function(FunctionBasis(2, SILU.derivatives), 5, z) is LayerJet


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
@pytest.mark.parametrize("weights", [None, [1.0, -2.0]])
@pytest.mark.parametrize("straight", [True, False], ids=["straight", "curved"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_one_function(outputs, straight, weights, wanted):
    """What plain operations give, and all gradients, twice."""
    make = partial(torch.randn, dtype=torch.float64, requires_grad=True)
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    z, first, weight = make(3, 80), make(2, 3, 80), make(outputs, 3)
    second = None if straight else make(2 if weights is None else 1, 3, 80)
    inputs = [part for part in (z, first, second, weight) if part is not None]
    plain = partial(_by_plain_operations, SILU, [], weights, False)

    def results(function) -> list[Tensor]:
        parts = function(z, first, second, weight)
        loss = sum(parts[index].square().sum() for index in wanted)
        by_hand, gradients = (
            torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=twice, materialize_grads=True)
            for twice in (False, True)
        )
        again = torch.autograd.grad(sum(g.square().sum() for g in gradients), weight)
        return [*parts, *by_hand, *gradients, *again]

    found = results(lambda *arguments: OneFunctionJet.apply(*arguments, SILU, weights, False, plain))
    for a, e in zip(found, results(plain), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_the_second_derivative_alone():
    z, first, weight = torch.randn(3, 80), torch.randn(2, 3, 80), torch.randn(4, 3)
    weights, plain = torch.ones(2), partial(_by_plain_operations, SILU, [], torch.ones(2), False)
    found = OneFunctionJet.apply(z, first, None, weight, SILU, weights, True, plain)
    assert found[:2] == (None, None)
    torch.testing.assert_close(found[2], plain(z, first, None, weight).second)
