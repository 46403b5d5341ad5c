# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A KAN solves -laplacian(u) + u^3 = f; an adapter solves it for another f.

python examples/pde.py  # half a minute on one core; writes nothing
"""

import math

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, solve
from peft_lotra.pde.solution import Solution


LOW, HIGH = (-1, -1), (1, 1)


def exact(x: Tensor, a: float) -> Tensor:
    """Return the solution, from which f and the boundary values are made."""
    return torch.sin(math.pi * x[:, :1]) * torch.sin(a * math.pi * x[:, 1:])


def solve_for(a: float, network: nn.Module, **options) -> Solution:
    def equation(model: nn.Module, x: Tensor) -> Tensor:
        # value, gradient and Laplacian in one forward pass
        u, _, laplacian = jet(model, x, collapse=True)
        f = math.pi**2 * (1 + a**2) * exact(x, a) + exact(x, a) ** 3
        return -laplacian + u**3 - f

    def lift(x: Tensor) -> Tensor:  # any function with the boundary values
        return torch.sin(math.pi * x[:, :1]) * math.sin(a * math.pi) * x[:, 1:]

    conditions = {"distance": BoxDistance(LOW, HIGH), "lift": lift}
    result = solve(
        equation, LOW, HIGH, network=network, **conditions, **options
    )
    x = torch.rand(4000, 2, dtype=torch.float64) * 2 - 1
    error = (result.model(x) - exact(x, a)).norm() / exact(x, a).norm()
    print(f"{result}\na = {a}: relative error {error:.1e}\n")
    return result


torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
kan = KAN([2, 8, 8, 1], grid_size=8, spline_order=5, norm="tanh")
base = solve_for(1.0, kan, steps=30)
config = LoTRAConfig(r=(4, 4, 8), rank_pattern={"layers.4": (1, 4, 8)})
adapted = get_peft_model(base.model.kan, config)
# trains what requires a gradient: the adapter
solve_for(1.2, adapted, steps=15)
