# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the package does with any layer, done with layers of several parts, lists, blocks and ragged members."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import inputs, relative
from peft import get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    check_kan_layer,
    extract_lotra,
    find_kan_layers,
    model_summary,
    preprocess_lotra,
    register_kan_layer,
    slim,
    suggest_ranks,
    to_dense,
    update_spectrum,
)


def powers(x, count):
    return x[..., None] ** torch.arange(count)


class Parts(nn.Module):
    """Powers, and waves in a list, with residual weights in a layer of torch."""

    def __init__(self, i=3, o=4):
        super().__init__()
        self.a = nn.Parameter(torch.randn(o, 5 * i))
        self.waves = nn.ParameterList([torch.randn(i, o, 2, 2)])
        self.base = nn.Linear(i, o)

    def forward(self, x):
        phases = torch.stack([x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], -1).unflatten(-1, (2, 2))
        y = powers(x, 5).transpose(1, 2).flatten(1) @ self.a.T
        return y + torch.einsum("bist,iost->bo", phases, self.waves[0]) + self.base(x.relu())


class Blocks(nn.Module):
    """Two blocks of outputs, each of inputs of its own."""

    def __init__(self, i=4, o=6):
        super().__init__()
        self.weight, self.base = nn.Parameter(torch.randn(2, o // 2, i // 2, 4)), nn.Parameter(torch.randn(o, i // 2))

    def forward(self, x):
        x = x.unflatten(-1, (2, -1))
        y = torch.einsum("bgik,goik->bgo", powers(x, 4), self.weight).flatten(1)
        return y + torch.einsum("bgi,goi->bgo", x, self.base.view(2, -1, self.base.shape[1])).flatten(1)


LAYERS = {
    "parts": (
        Parts,
        {"coefficients": [("a", "o (k i)"), ("waves.*", "i o s t")], "residual": ("base.weight", "o i")},
        (4, 3, 9),
    ),
    "blocks": (
        Blocks,
        {"coefficients": ("weight", "g o i k"), "residual": ("base", "(g o) i"), "groups": "g"},
        (6, 2, 4),
    ),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A model with a layer of a registered kind, inputs, and the canonical shape."""
    cls, description, shape = LAYERS[request.param]
    register_kan_layer(request.param, matches=cls, **description)
    torch.manual_seed(0)
    layer = cls()
    x = inputs(9, in_features={Blocks: 4}.get(cls, 3))
    return nn.Sequential(nn.Tanh(), layer, nn.Linear(layer(x).shape[-1], 2)), x, shape


def trained(model, x, steps=5, lr=0.03):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model


def test_gradient_start_spectra_and_extraction(case):
    base, x, shape = case
    tuned, fresh = trained(copy.deepcopy(base), x), copy.deepcopy(base)
    with torch.no_grad():
        tuned[2].load_state_dict(base[2].state_dict())
        for name, parameter in tuned[1].named_parameters():
            if name.endswith("bias"):
                parameter.copy_(base[1].get_parameter(name))
    assert set(suggest_ranks(update_spectrum(base, tuned), energy=0.9)) == {"^1"}
    extracted = extract_lotra(copy.deepcopy(base), tuned, r=100)
    torch.testing.assert_close(extracted(x), tuned(x), rtol=1e-4, atol=1e-4)
    config = LoTRAConfig(r=2, init_weights="gradient")
    preprocess_lotra(base, config, lambda: (base(x) - 1).square().mean().backward())
    model = get_peft_model(base, config)
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-5, atol=1e-6)
    assert model_summary(model)[0].shape == shape and check_kan_layer(model.base_model.model[1]).shape == shape


@pytest.mark.filterwarnings("ignore:.*more parameters")
def test_slim(case):
    base, x, shape = case
    compressed = slim(base, ranks=(2, 2, 2))
    assert find_kan_layers(compressed)[0].shape == shape
    dense = to_dense(compressed)
    assert type(dense[1]) is type(base[1]) and relative(dense(x), compressed(x)) < 1e-5
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    model = trained(get_peft_model(compressed, LoTRAConfig(r=2)), x)
    y = model(x)
    assert relative(model.merge_and_unload()(x), y) < 1e-4
