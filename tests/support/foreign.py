# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks (2 inputs, 1 output, float64) that are no `KAN`: of other libraries, and of one's own around KAN layers."""

import torch
from stand_ins import ChebyKANLayer, FastKANLayer, NaiveFourierKANLayer, PINAKANBlock
from torch import nn

from peft_lotra.kan import KAN


class Hard(nn.Module):
    """Zero on the boundary of the unit square."""

    def __init__(self, kan):
        super().__init__()
        self.kan = kan

    def forward(self, x):
        return (x * (1 - x)).prod(-1, keepdim=True) * self.kan(x)


class Loop(nn.Module):
    """The container of efficient-kan, FastKAN and others."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def pykan(**kwargs):
    from kan import KAN as PyKAN

    return PyKAN(width=[2, 4, 1], auto_save=False, seed=0, **kwargs)


def efficient():
    from qkan.kan import KAN as EfficientKAN

    return EfficientKAN([2, 4, 1])


FOREIGN = {
    "efficient-kan": efficient,
    "pykan": pykan,
    "fast-kan": lambda: Loop(FastKANLayer(2, 4, use_layernorm=False), FastKANLayer(4, 1)),
    "cheby-kan": lambda: nn.Sequential(ChebyKANLayer(2, 4, 4), ChebyKANLayer(4, 1, 4)),
    "fourier-kan": lambda: nn.Sequential(NaiveFourierKANLayer(2, 4, 3), NaiveFourierKANLayer(4, 1, 3)),
    "pina": lambda: Loop(*(PINAKANBlock(*size, spline_order=4, n_knots=12) for size in ((2, 4), (4, 1)))),
    "tanh": lambda: nn.Sequential(KAN([2, 4, 1]), nn.Tanh()),
    "hard": lambda: Hard(KAN([2, 4, 1])),
    "hard-efficient-kan": lambda: Hard(efficient()),
    "mlp": lambda: nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 1)),
}


def make_foreign(name):
    torch.manual_seed(0)
    return FOREIGN[name]().double()
