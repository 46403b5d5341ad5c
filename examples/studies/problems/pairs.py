# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Burgers' equation at two viscosities, as a pair of tasks of the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from pairs import Pair
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from problems.families import FAMILIES, sobol, test_points


BURGERS = FAMILIES["burgers"]


class Equation(Pair):
    """Burgers' equation for t from -1 to 1: its inputs are points (x, t), its targets zeros, but those of the test."""

    def start(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.residual(model, x, BURGERS.base)

    def outputs(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.residual(model, x, BURGERS.targets["middle"])

    @staticmethod
    def solution(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return -torch.sin(math.pi * x[:, :1]) + (1 - x[:, :1] ** 2) * (x[:, 1:] + 1) * model(x)

    def residual(self, model: Callable[[Tensor], Tensor], x: Tensor, viscosity: float) -> Tensor:
        along_x, along_t = torch.eye(2)[:, None].expand(2, *x.shape)
        u, u_t = jvp(partial(self.solution, model), (x,), (along_t,))
        u_x, u_xx = jvp(lambda x: jvp(partial(self.solution, model), (x,), (along_x,))[1], (x,), (along_x,))
        return 2 * u_t + u * u_x - viscosity * u_xx

    def score(self, model: nn.Module, part: str) -> float:
        """Return by how many digits the residual is below 1, or the error below the solution."""
        x, target = getattr(self, part)
        if part == "test":
            return -(self.solution(model, x) - target).norm().div(target.norm()).log10().item()
        # no `no_grad`: silu has no second forward derivative there
        return -self.outputs(model, x).square().mean().sqrt().log10().item()


def burgers(seed: int, labels: int) -> Equation:
    generator = torch.Generator().manual_seed(seed)
    old, new, held_out = (
        (x, torch.zeros(len(x), 1)) for x in (sobol(generator, rows).float() for rows in (4096, labels, 1000))
    )
    reference = test_points().float(), BURGERS.reference(BURGERS.targets["middle"]).float()
    return Equation([2, 16, 16, 1], old, new, held_out, reference, F.mse_loss)
