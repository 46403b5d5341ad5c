# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A PDE from zero: a KAN solves -laplacian(u) + u^3 = f, and an adapter brings it to another f, by least squares."""

import argparse

import torch
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt


def solution(x: torch.Tensor, a: float) -> torch.Tensor:  # of which f, the boundary values and the error are made
    return torch.sin(torch.pi * x[:, :1]) * torch.sin(a * torch.pi * x[:, 1:])


def equation(model: torch.nn.Module, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    u, _, laplacian = jet(model, x, collapse=True)  # value, gradient and Laplacian in one forward pass
    return -laplacian + u**3 - f


NOTES = "Needs nothing beside the package; takes half a minute on one core; writes nothing."
argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, epilog=NOTES).parse_args()

torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
inside = torch.rand(1500, 2) * 2 - 1
rim = torch.rand(400, 2) * 2 - 1
rim[torch.arange(400), torch.arange(400) % 2] = torch.rand(400).round() * 2 - 1


def solve(model: torch.nn.Module, a: float, steps: int) -> None:
    def boundary(model: torch.nn.Module, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return model(x) - u

    f = torch.pi**2 * (1 + a**2) * solution(inside, a) + solution(inside, a) ** 3
    terms = [(equation, (inside, f), 1.0), (boundary, (rim, solution(rim, a)), 1000.0)]  # the rim must weigh more
    LevenbergMarquardt(model).fit(terms, steps)  # trains what requires a gradient
    x = torch.rand(4000, 2) * 2 - 1
    print(f"a = {a}: relative error {(model(x) - solution(x, a)).norm() / solution(x, a).norm():.1e}")


kan = KAN([2, 16, 16, 1], grid_size=5)
solve(kan, a=1.0, steps=25)
model = get_peft_model(kan, LoTRAConfig(r=(8, 8, 6), rank_pattern={"layers.2": (1, 4, 6)}))
solve(model, a=1.2, steps=20)
