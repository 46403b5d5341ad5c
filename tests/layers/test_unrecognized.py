# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modules that may be KAN layers: the reason why they are not recognized, and a registration to paste."""

import pytest
import torch
from helpers import adapt
from orders import Formula, Layer
from stand_ins import LAYER_KINDS
from torch import nn

from peft_lotra import find_kan_layers, register_kan_layer
from peft_lotra.kan import KANLinear
from peft_lotra.layers.search import UnrecognizedModule


class Powers(Layer):
    def __init__(self, i, o):
        super().__init__(i, o, order="i k o", residual="io")


class Edges(Formula):
    """A function with a trained center on each edge, so that the output is not linear in the centers."""

    def __init__(self, i, o, k=3):
        super().__init__(None, w=(o, i, k), mu=(o, i, k))

    def forward(self, x):
        return (self.w * torch.exp(-((x[:, None, :, None] - self.mu) ** 2))).sum((2, 3))


LAYERS = {
    "powers": (Powers, '("A", "i k o")', 'residual=("base", "i o"),'),
    "edges": (Edges, '[("w", "o i k"), ("mu", "o i m")]', ""),
}


def with_edges(cls):
    """Return a layer class that also takes a graph."""
    return type(cls.__name__, (cls,), {"forward": lambda self, x, edges: cls.forward(self, x) * edges.mean()})


class Between(nn.Module):
    def __init__(self, layer, i, o):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(2, i), layer, nn.Linear(o, 2)

    def forward(self, x, edges):
        return self.last(self.layer(self.first(x), edges=edges))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_registration_can_be_pasted(kind):
    cls, coefficients, residual = LAYERS[kind]
    model = Between(with_edges(cls)(4, 4), 4, 4)

    (alone,) = find_kan_layers(model).unrecognized
    (candidate,) = find_kan_layers(model, torch.rand(5, 2), torch.ones(3)).unrecognized
    exec(candidate.registration, {"register_kan_layer": register_kan_layer})

    assert alone.registration == ""
    assert "missing 1 required positional argument: 'edges'" in alone.reason
    assert isinstance(candidate, UnrecognizedModule)
    assert candidate[:2] == ("layer", cls.__name__)
    assert f"coefficients={coefficients}," in candidate.registration
    assert residual in candidate.registration
    (row,) = find_kan_layers(model)
    assert (row.name, row.kind, row.shape[:2]) == ("layer", cls.__name__, (4, 4))


def test_known_layers_and_those_of_torch_are_no_candidates():
    known = [LAYER_KINDS[kind](3, 4) for kind in ("own", "efficient-kan", "fast-kan", "cheby-kan", "fourier-kan")]
    of_torch = [nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2), nn.LSTM(3, 4), nn.Transformer(8, 2, 1, 1, 8)]

    assert not find_kan_layers(nn.ModuleList(known + of_torch)).unrecognized


def test_adapted_layers_are_no_candidates():
    rows = find_kan_layers(adapt(nn.Sequential(KANLinear(3, 4), KANLinear(4, 2))))

    assert len(rows) == 2
    assert not rows.unrecognized
