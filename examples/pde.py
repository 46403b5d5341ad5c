# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A PDE from zero: a KAN solves -laplacian(u) + u^3 = f on a square, and an adapter brings it to another f."""

import argparse
import math

import torch
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, Solution, solve


LOW, HIGH = (-1, -1), (1, 1)


def exact(x: torch.Tensor, a: float) -> torch.Tensor:  # of which f, the boundary values and the error are made
    return torch.sin(math.pi * x[:, :1]) * torch.sin(a * math.pi * x[:, 1:])


def solved(a: float, steps: int, network: torch.nn.Module, refine: bool = True) -> Solution:
    def equation(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        u, _, laplacian = jet(model, x, collapse=True)  # value, gradient and Laplacian in one forward pass
        f = math.pi**2 * (1 + a**2) * exact(x, a) + exact(x, a) ** 3
        return -laplacian + u**3 - f

    def lift(x: torch.Tensor) -> torch.Tensor:  # any function with the values of u on the sides
        return torch.sin(math.pi * x[:, :1]) * math.sin(a * math.pi) * x[:, 1:]

    conditions = {"distance": BoxDistance(LOW, HIGH), "lift": lift}
    result = solve(equation, LOW, HIGH, **conditions, network=network, refine=refine, steps=steps)
    x = torch.rand(4000, 2, dtype=torch.float64) * 2 - 1
    error = (result.model(x) - exact(x, a)).norm() / exact(x, a).norm()
    print(f"{result}\na = {a}: relative error {error:.1e}\n")
    return result


NOTES = "Needs nothing beside the package; takes half a minute on one core; writes nothing."
argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, epilog=NOTES).parse_args()

torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
kan = KAN([2, 8, 8, 1], grid_size=8, spline_order=5, norm="tanh")
base = solved(1.0, steps=30, network=kan)
adapted = get_peft_model(base.model.kan, LoTRAConfig(r=(4, 4, 8), rank_pattern={"layers.4": (1, 4, 8)}))
solved(1.2, steps=15, network=adapted, refine=False)  # trains what requires a gradient: the adapter
