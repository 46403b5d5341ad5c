# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Problems on which `solve` stalled, and six equations for a comparison with an MLP, with their exact solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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
        outputs: the number of unknown functions.
        options: what a user may pass instead of the defaults.
    """

    title: str
    low: list[float]
    high: list[float]
    residual: Callable[[nn.Module, Tensor], Tensor]
    distance: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    lift: Any = 0.0
    outputs: int = 1
    options: dict[str, Any] = field(default_factory=dict)

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


# -laplacian u = f in five dimensions, u the product of sines


def product(x: Tensor) -> Tensor:
    return torch.prod(torch.sin(PI * x), -1, keepdim=True)


def poisson(model: nn.Module, x: Tensor) -> Tensor:
    return jet(model, x, collapse=True)[2] + 5 * PI**2 * product(x)


# Klein-Gordon: u_tt - u_xx + u^3 = f, u = x cos(5 pi t) + (x t)^3


def swinging(x: Tensor) -> Tensor:
    s, t = x[..., :1], x[..., 1:]
    return s * torch.cos(5 * PI * t) + (s * t) ** 3


def klein_gordon(model: nn.Module, x: Tensor) -> Tensor:
    u, _, (u_xx, u_tt) = jet(model, x)
    s, t = x[:, :1], x[:, 1:]
    force = -25 * PI**2 * s * torch.cos(5 * PI * t) + 6 * s**3 * t - 6 * s * t**3 + swinging(x) ** 3
    return u_tt - u_xx + u**3 - force


def swinging_ends(x: Tensor) -> Tensor:
    s, t = x[..., :1], x[..., 1:]
    return s * (torch.cos(5 * PI * t) + t**3)


# u_t = 10 u (1 - u) from a bump, of which no wave travels


def reaction(model: nn.Module, x: Tensor) -> Tensor:
    u, (_, rate) = jet(model, x, order=1)
    return rate - 10 * u * (1 - u)


def bump(x: Tensor) -> Tensor:
    return torch.exp(-((x[..., :1] - PI) ** 2) / (2 * (PI / 4) ** 2))


def grown(x: Tensor) -> Tensor:
    start, factor = bump(x), torch.exp(10 * x[..., 1:])
    return start * factor / (start * factor + 1 - start)


# u'' + 4 u' + 404 u = 0, an oscillation that decays


def oscillator(model: nn.Module, x: Tensor) -> Tensor:
    u, (slope,), (second,) = jet(model, x)
    return second + 4 * slope + 404 * u


def decaying(x: Tensor) -> Tensor:
    return torch.exp(-2 * x) * (torch.cos(20 * x) + torch.sin(20 * x) / 10)


# u_t = (u_xx + u_yy) / 10 on a square


def heat(model: nn.Module, x: Tensor) -> Tensor:
    _, du, second = jet(model, x, collapse=(0.1, 0.1, 0.0))
    return du[2] - second


def two_humps(x: Tensor) -> Tensor:
    a, b = PI * x[..., :1], PI * x[..., 1:2]
    return torch.sin(a) * torch.sin(b) + torch.sin(2 * a) * torch.sin(3 * b) / 2


def cooling(x: Tensor) -> Tensor:
    a, b, t = PI * x[..., :1], PI * x[..., 1:2], x[..., 2:]
    slow = torch.exp(-0.2 * PI**2 * t) * torch.sin(a) * torch.sin(b)
    return slow + torch.exp(-1.3 * PI**2 * t) * torch.sin(2 * a) * torch.sin(3 * b) / 2


UNIT = ([0.0, 0.0], [1.0, 1.0])
WALLS = [(0, "low"), (0, "high")]
FIVE = ([0.0] * 5, [1.0] * 5)
CUBE = ([0.0] * 3, [1.0] * 3)
START = (1, "low")

STALLED = {
    "lotka_volterra": Case(
        "Lotka-Volterra, four periods",
        [0.0],
        [1.0],
        lotka_volterra,
        lambda x: x,
        populations,
        first_populations,
        outputs=2,
        options={"windows": 8},
    ),
    "wave": Case(
        "u_tt = 100 u_xx, ten periods",
        *UNIT,
        wave,
        BoxDistance(*UNIT, [*WALLS, START], [START]),
        standing_waves,
        first_waves,
        options={"windows": 8},
    ),
    "fast_poisson": Case(
        "u'' = f, u = sin(50 pi x)",
        [0.0],
        [1.0],
        fast_poisson,
        BoxDistance([0], [1]),
        lambda x: torch.sin(50 * PI * x),
        options={"frequencies": 25},
    ),
    "thin_layer": boundary_layer(1e-3, "boundary layer of 0.001"),
}

# named on 2026-11-30, before the first run of any of them against an MLP by this version of `solve`
SIX = {
    "layer": boundary_layer(1e-2, "boundary layer of 0.01"),
    "poisson": Case("Poisson in five dimensions", *FIVE, poisson, BoxDistance(*FIVE), product),
    "klein_gordon": Case(
        "Klein-Gordon, 2.5 periods",
        *UNIT,
        klein_gordon,
        BoxDistance(*UNIT, [*WALLS, START], [START]),
        swinging,
        swinging_ends,
    ),
    "reaction": Case(
        "reaction u_t = 10 u (1 - u)", [0.0, 0.0], [2 * PI, 1.0], reaction, lambda x: x[..., 1:], grown, bump
    ),
    "oscillator": Case(
        "damped oscillator, 6.4 periods",
        [0.0],
        [2.0],
        oscillator,
        lambda x: x**2,
        decaying,
        torch.ones_like,
    ),
    "heat": Case(
        "heat on a square",
        *CUBE,
        heat,
        BoxDistance(*CUBE, [(0, "low"), (0, "high"), (1, "low"), (1, "high"), (2, "low")]),
        cooling,
        two_humps,
    ),
}
