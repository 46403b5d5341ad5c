# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family of PDEs with exact boundary and initial values inside of the residual, and its reference.

Burgers: u = -sin(pi x) + t (1 - x^2) N(x, s), t = (s + 1) / 2. The
equation and the spectral reference are those of families.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt
from problems import families


@dataclass(frozen=True)
class Problem:
    """A family with one parameter.

    Attributes:
        base: The parameter of the base, reached through `before`.
        residual: The residual (n, 1) of a network at rows (x, c), c (n, 1).
        solution: The solution (n, 1) by rows x and the values of the network.
        reference: The solution on the test grid, (GRID, GRID).
    """

    base: float
    before: tuple[float, ...]
    residual: Callable[[nn.Module, Tensor, Tensor], Tensor]
    solution: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[[float], np.ndarray]

    def terms_of(self, c: float, points: int, seed: int) -> list[tuple]:
        x = families.sobol(torch.Generator().manual_seed(seed), points)
        return [(self.residual, (x, torch.full_like(x[:, :1], c)))]

    def error(self, evaluate: Callable[[Tensor], Tensor], c: float) -> float:
        """The relative L2 error of a network on the test grid."""
        x = families.test_points()
        reference = torch.from_numpy(self.reference(c)).reshape(-1, 1)
        with torch.no_grad():
            u = self.solution(x, evaluate(x))
        return ((u - reference).norm() / reference.norm()).item()

    def pretrained(self, seed: int, points: int, steps: int) -> KAN:
        torch.manual_seed(seed)
        base = KAN([2, 10, 10, 1], 8, dtype=torch.float64)
        for c in (*self.before, self.base):
            terms = self.terms_of(c, points, seed)
            count = steps if c == self.base else steps // 3
            LevenbergMarquardt(base, floor=1e-6).fit(terms, count, progress=False)
        return base


def burgers(model: nn.Module, x: Tensor, nu: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx."""
    n, (n_x, n_s), n_xx = jet(model, x, collapse=(1.0, 0.0))
    place, t = x[:, :1], (x[:, 1:] + 1) / 2
    zero = 1 - place**2
    u = -torch.sin(math.pi * place) + t * zero * n
    u_x = -math.pi * torch.cos(math.pi * place) + t * (zero * n_x - 2 * place * n)
    u_xx = math.pi**2 * torch.sin(math.pi * place) + t * (zero * n_xx - 4 * place * n_x - 2 * n)
    return zero * n + 2 * t * zero * n_s + u * u_x - nu * u_xx


def burgers_solution(x: Tensor, n: Tensor) -> Tensor:
    return -torch.sin(math.pi * x[:, :1]) + (x[:, 1:] + 1) / 2 * (1 - x[:, :1] ** 2) * n


@cache
def burgers_reference(nu: float) -> np.ndarray:
    return families.solve_evolution(
        nu, lambda u, u_x: -u * u_x, lambda x, module: -module.sin(math.pi * x), resolution=256
    )


BURGERS = Problem(0.036, (0.15, 0.07), burgers, burgers_solution, burgers_reference)
