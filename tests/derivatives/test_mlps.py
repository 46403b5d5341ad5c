# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""Chains of `nn.Linear` and activations: the closed form beside nested autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from jet_helpers import assert_same, nested, points
from torch import Tensor, nn

from peft_lotra.derivatives.stages import stages_of
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import HardConstraint


class Sine(nn.Module):
    def __init__(self, rate: float = 3.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.rate * x)


class Centered(nn.Module):
    """Has no state, but depends on all numbers of a row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x - x.mean(-1, keepdim=True))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


def mlp(activation: nn.Module) -> nn.Sequential:
    layers = nn.Linear(2, 6), activation, nn.Linear(6, 5, bias=False), activation, nn.Linear(5, 2)
    return nn.Sequential(*layers).double()


ACTIVATIONS = [nn.Tanh(), Sine(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(2.0, 1.0), nn.Sigmoid()]
MODELS = {
    **{repr(activation): lambda activation=activation: mlp(activation) for activation in ACTIVATIONS},
    "own module": lambda: Chain().double(),
    "constrained": lambda: HardConstraint(mlp(nn.Tanh()), lambda x: x[..., :1] * (1 - x[..., 1:])),
    "with a KAN": lambda: nn.Sequential(KAN([2, 4]), nn.Tanh(), nn.Linear(4, 2)).double(),
}


@pytest.mark.parametrize("name", MODELS)
def test_closed_form(name):
    model, x = MODELS[name](), points(80, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which tells of the transforms
        found = jet(model, x)
    assert_same(found, nested(model, x))
    torch.testing.assert_close(jet(model, x, collapse=(1.0, -2.0))[2], found[2][0] - 2 * found[2][1])
    gradients, expected = (
        torch.autograd.grad(sum(part.square().sum() for part in parts), list(model.parameters()), allow_unused=True)
        for parts in (found, nested(model, x))
    )
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_linear_layer():
    model, x = nn.Linear(2, 3), torch.rand(4, 5, 2)
    u, du, d2u = jet(model, x)
    torch.testing.assert_close((u, du[1, 2, 3]), (model(x), model.weight[:, 1]))
    assert d2u.shape == (2, 4, 5, 3) and not d2u.any() and jet(model, x, collapse=True)[2].shape == (4, 5, 3)


def test_float32():
    model, x = mlp(nn.Tanh()), points(80, 2)
    exact, found = jet(model, x), jet(model.float(), x.float())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


def test_modules_that_are_no_activation():
    assert stages_of(nn.Sequential(nn.Linear(2, 3), Centered())) is None
