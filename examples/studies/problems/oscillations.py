# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Problems with oscillations or thin layers, on which `solve` may stall, and their exact solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, box_points
from problems.odes import populations


PI = math.pi


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        title: for the table.
        low, high, residual, distance, lift: as for `solve`.
        exact: the solution at points (n, I).
    """

    title: str
    low: list[float]
    high: list[float]
    residual: Callable[[nn.Module, Tensor], Tensor]
    distance: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    lift: Any = 0.0

    def points(self) -> Tensor:
        """Return points that are never trained: 2,001 of a line, or 10,000 of a box."""
        if len(self.low) == 1:
            return torch.linspace(self.low[0], self.high[0], 2001, dtype=torch.float64).unsqueeze(1)
        return box_points(self.low, self.high, 10000, seed=12345)

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Return the relative L2 error."""
        x = self.points()
        exact = self.exact(x)
        return ((model(x) - exact).norm() / exact.norm()).item()


# Lotka-Volterra in DeepXDE's scaling, over four periods


def lotka_volterra(model: nn.Module, x: Tensor) -> Tensor:
    u, (rate,) = jet(model, x, order=1)
    prey, predators = u[:, :1], u[:, 1:]
    growth = torch.cat([40 * prey - 160 * prey * predators, 80 * prey * predators - 21.2 * predators], 1)
    return rate - growth


def first_populations(x: Tensor) -> Tensor:
    return torch.tensor([0.5, 0.075], dtype=x.dtype).expand(*x.shape[:-1], 2)


# u_tt = 100 u_xx, two standing waves (DeepXDE's wave_1d)


def wave(model: nn.Module, x: Tensor) -> Tensor:
    return jet(model, x, collapse=(-100.0, 1.0))[2]


def standing_waves(x: Tensor) -> Tensor:
    s, t = x[..., :1], x[..., 1:]
    return torch.sin(PI * s) * torch.cos(10 * PI * t) + torch.sin(2 * PI * s) * torch.cos(20 * PI * t)


def first_waves(x: Tensor) -> Tensor:
    return torch.sin(PI * x[..., :1]) + torch.sin(2 * PI * x[..., :1])


# -u'' = (50 pi)^2 sin(50 pi x)


def fast_poisson(model: nn.Module, x: Tensor) -> Tensor:
    return jet(model, x)[2][0] + (50 * PI) ** 2 * torch.sin(50 * PI * x)


# eps u'' + u' = -1, with a layer of width eps at x = 0


def boundary_layer(eps: float, title: str) -> Case:
    def residual(model: nn.Module, x: Tensor) -> Tensor:
        _, (slope,), (second,) = jet(model, x)
        return eps * second + slope + 1

    def exact(x: Tensor) -> Tensor:
        return (1 - torch.exp(-x / eps)) / (1 - math.exp(-1 / eps)) - x

    return Case(title, [0.0], [1.0], residual, BoxDistance([0], [1]), exact)


UNIT = ([0.0, 0.0], [1.0, 1.0])
WALLS = [(0, "low"), (0, "high")]
START = (1, "low")

CASES = {
    "lotka_volterra": Case(
        "Lotka-Volterra, four periods",
        [0.0],
        [1.0],
        lotka_volterra,
        lambda x: x,
        populations,
        first_populations,
    ),
    "wave": Case(
        "u_tt = 100 u_xx, ten periods",
        *UNIT,
        wave,
        BoxDistance(*UNIT, [*WALLS, START], [START]),
        standing_waves,
        first_waves,
    ),
    "fast_poisson": Case(
        "u'' = f, u = sin(50 pi x)",
        [0.0],
        [1.0],
        fast_poisson,
        BoxDistance([0], [1]),
        lambda x: torch.sin(50 * PI * x),
    ),
    "thin_layer": boundary_layer(1e-3, "boundary layer of 0.001"),
    "layer": boundary_layer(1e-2, "boundary layer of 0.01"),
}
