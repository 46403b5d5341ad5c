# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from jet_helpers import nested, network
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.pde import causal_weights, gradient_weights


def test_gradient_weights_against_autograd():
    model, x = network(2, 5, 2), torch.rand(20, 2, dtype=torch.float64)
    slopes = nested(model, x)[1]  # (2, 20, 2)
    expected = 1 / (1 + 0.3 * slopes.square().sum((0, 2)).sqrt())
    found = gradient_weights(model, x, 0.3)
    torch.testing.assert_close(found[:, 0], expected)
    assert not found.requires_grad
    along = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    expected = 1 / (1 + 0.3 * slopes[0].square().sum(1).sqrt())
    torch.testing.assert_close(gradient_weights(model, x, 0.3, along)[:, 0], expected)


def test_causal_weights_against_the_sum():
    times, r = torch.rand(60, dtype=torch.float64), torch.randn(60, 2, dtype=torch.float64)
    times[:2] = torch.tensor([0.0, 1.0])
    found = causal_weights(r, times, strictness=0.4, slices=5)
    for i in range(60):
        earlier = 0.0
        for number in range(min(int(5 * times[i]), 4)):
            inside = [j for j in range(60) if min(int(5 * times[j]), 4) == number]
            earlier += sum(r[j].square().sum().item() for j in inside) / max(1, len(inside))
        assert found[i, 0].square().item() == pytest.approx(math.exp(-0.4 * earlier))


def test_weights_are_rows_of_residual_terms():
    torch.manual_seed(1)
    model, x = network(2, 5, 1), torch.rand(80, 2, dtype=torch.float64)

    def equation(model: nn.Module, x: Tensor, w: Tensor | float) -> Tensor:
        u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return w * (u_t - u_xx - u)

    r = equation(model, x, 1.0).detach()
    before = r.square().mean().item()
    for _ in range(2):
        w = gradient_weights(model, x) * causal_weights(r, x[:, 1])
        LevenbergMarquardt(model).fit([(equation, (x, w))], 3, progress=False)
        r = equation(model, x, 1.0).detach()
    assert r.square().mean().item() < before


R, T = torch.ones(4), torch.linspace(0, 1, 4)
WRONG = {
    "`scale` is -1": lambda: gradient_weights(network(2, 1), torch.rand(4, 2), -1),
    "`times` has 3 entries for 4 residuals": lambda: causal_weights(R, T[:3]),
    "`strictness` is -1.0": lambda: causal_weights(R, T, -1.0),
    "`residuals` is not finite at row 0": lambda: causal_weights(R * math.nan, T),
    "`residuals` is NoneType": lambda: causal_weights(None, T),
    "`times` must be finite": lambda: causal_weights(R, T / 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
