# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the package does with any layer, done with a described one of blocks, several parts and a list."""

import pytest
import torch
from helpers import assert_near, inputs, train
from peft import get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    find_kan_layers,
    register_kan_layer,
)


class Parts(nn.Module):
    """Two blocks of outputs, each of inputs of its own; powers, waves in a list, and residual weights."""

    def __init__(self):
        super().__init__()
        self.powers, self.base = nn.Parameter(torch.randn(2, 3, 5 * 2)), nn.Parameter(torch.randn(6, 2))
        self.waves = nn.ParameterList([torch.randn(2, 2, 3, 2, 2)])

    def forward(self, x):
        x = x.unflatten(-1, (2, 2))
        phases = torch.stack([x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], -1).unflatten(-1, (2, 2))
        y = torch.einsum("bgik,goki->bgo", x[..., None] ** torch.arange(5), self.powers.unflatten(-1, (5, 2)))
        y = y + torch.einsum("bgist,giost->bgo", phases, self.waves[0])
        return (y + torch.einsum("bgi,goi->bgo", x.relu(), self.base.view(2, 3, 2))).flatten(1)


SHAPE = (6, 2, 9)


@pytest.fixture
def case():
    """A model with a layer of a registered kind, and inputs."""
    register_kan_layer(
        "parts",
        matches=Parts,
        coefficients=[("powers", "g o (k i)"), ("waves.*", "g i o s t")],
        residual=("base", "(g o) i"),
        groups="g",
    )
    torch.manual_seed(0)
    return nn.Sequential(nn.Tanh(), Parts(), nn.Linear(6, 2)), inputs(9, in_features=4)


@pytest.mark.filterwarnings("ignore:.*more parameters")
def test_a_described_kind_is_adapted_and_merged(case):
    base, x = case

    assert find_kan_layers(base)[0].shape == SHAPE

    model = train(get_peft_model(base, LoTRAConfig(r=2)), x)
    y = model(x)

    assert_near(model.merge_and_unload()(x), y, 1e-4)
