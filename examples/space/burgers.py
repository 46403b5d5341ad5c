# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Burgers' equation u_t + u u_x = nu u_xx on -1 < x < 1, 0 < t < 1.

Its initial and boundary values are exact.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet


# the viscosities of the family, few: what is between them is interpolated
MEMBERS = (0.03, 0.055, 0.1)


def network() -> KAN:
    """The network N(x, s) of the base, s = 2 t - 1."""
    return KAN([2, 10, 10, 1], 8, dtype=torch.float64)


def solution(model: nn.Module, rows: Tensor) -> Tensor:
    """u = -sin(pi x) + t (1 - x^2) N at rows (x, s)."""
    x, t = rows[:, :1], (rows[:, 1:] + 1) / 2
    return -torch.sin(math.pi * x) + t * (1 - x**2) * model(rows)


def reference(rows: Tensor, nu: float) -> Tensor:
    """The exact u, by the transform of Cole and Hopf.

    The integrals take 100 nodes of Gauss and Hermite.
    """
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite.hermgauss(100))
    x, t = rows[:, :1], (rows[:, 1:] + 1) / 2
    y = math.pi * (x - nodes * (4 * nu * t).sqrt())
    weights = weights * torch.exp(-torch.cos(y) / (2 * math.pi * nu))
    return -(weights * torch.sin(y)).sum(1, keepdim=True) / weights.sum(
        1, keepdim=True
    )


def residual(model: nn.Module, rows: Tensor, nu: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx."""
    n, (n_x, n_s), n_xx = jet(model, rows, collapse=(1.0, 0.0))
    x, t = rows[:, :1], (rows[:, 1:] + 1) / 2
    zero, wave = 1 - x**2, math.pi * x
    u = -torch.sin(wave) + t * zero * n
    u_x = -math.pi * torch.cos(wave) + t * (zero * n_x - 2 * x * n)
    u_xx = math.pi**2 * torch.sin(wave) + t * (
        zero * n_xx - 4 * x * n_x - 2 * n
    )
    return zero * n + 2 * t * zero * n_s + u * u_x - nu * u_xx


def terms_of(nu: float, points: int = 1500) -> list[tuple]:
    """What the family minimizes at a viscosity."""
    engine = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
    rows = engine.draw(points, dtype=torch.float64) * 2 - 1
    return [(residual, (rows, torch.full_like(rows[:, :1], nu)))]


def grid(points: int) -> Tensor:
    """Rows (points^2, 2) of pictures: x to the right, t to above."""
    line = torch.linspace(-1, 1, points, dtype=torch.float64)
    s, x = torch.meshgrid(line.flip(0), line, indexing="ij")
    return torch.stack([x.flatten(), s.flatten()], dim=1)
