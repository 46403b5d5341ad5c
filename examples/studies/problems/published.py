# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Published tables as problems for Levenberg-Marquardt: the equation, its error, and what was published.

Sources: F. Dangel et al., "Kronecker-factored approximate curvature for physics-informed neural networks", arXiv
2405.15603, best runs in github.com/f-dangel/kfac-pinns-experiments; jaxKAN's paper, arXiv 2407.17611.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, HardConstraint, box_points, side_points
from peft_lotra.pde.features import BoxFeatures


Term = tuple[Callable[..., Tensor], tuple[Tensor, ...], float]
Sides = list[tuple[int, str]]
THEIRS = "MLP, published loss"
TERM_WEIGHT = 100.0  # of conditions that are terms; 1 in the published loss


@dataclass(frozen=True)
class Equation:
    """A PDE whose solution is known, on points that are drawn anew in each step.

    Attributes:
        distance, lift: of the conditions that the network satisfies exactly, see `HardConstraint`.
        sides, all_sides: where the solution is a term; in the published loss, which has no exact conditions.
        points, on_sides: the numbers of points.
        test: the points of the error.
    """

    low: list[float]
    high: list[float]
    residual: Callable[[nn.Module, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor], Tensor] | None
    lift: Callable[[Tensor], Tensor] | float
    sides: Sides
    all_sides: Sides
    points: int
    on_sides: int
    test: Callable[[], Tensor]
    measure: str = "RMS"

    def model(self, network: nn.Module, method: str) -> nn.Module:
        scaled = nn.Sequential(BoxFeatures(self.low, self.high), network)
        if self.distance is None or method == THEIRS:
            return scaled
        return HardConstraint(scaled, self.distance, self.lift).double()

    def terms(self, method: str, seed: int, step: int) -> list[Term]:
        """The terms of a step; those of step -1 are held out."""
        sides, weight = (self.all_sides, 1.0) if method == THEIRS else (self.sides, TERM_WEIGHT)
        number = 10_000 * (seed + 1) + step
        terms: list[Term] = [(self.residual, (box_points(self.low, self.high, self.points, seed=number),), 1.0)]
        if sides:
            rows, _ = side_points(self.low, self.high, self.on_sides // len(sides), sides, seed=number)
            terms.append((_misfit, (rows, self.exact(rows)), weight))
        return terms

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """The root mean square of the error, or its share of the solution's, by `measure`."""
        x = self.test()
        exact = self.exact(x)
        error = (model(x) - exact).square().mean().sqrt().item()
        return error / exact.square().mean().sqrt().item() if self.measure == "relative" else error


@dataclass(frozen=True)
class Subject:
    """A row of the scoreboard.

    Attributes:
        widths, grids, order: of the KAN; a grid follows when the one before has stopped to improve.
        hidden: of the tanh MLP.
        steps: of Levenberg-Marquardt.
        published: what others reached, in words.
        goals: errors whose seconds are told.
        methods: that are run.
    """

    title: str
    problem: Equation
    widths: list[int]
    hidden: list[int]
    steps: int
    published: str
    grids: tuple[int, ...] = (5, 10, 20)
    order: int = 5
    goals: tuple[float, ...] = ()
    methods: tuple[str, ...] = field(default=("KAN", "MLP"))

    def network(self, method: str) -> nn.Module:
        if method == "KAN":
            return KAN(self.widths, self.grids[0], self.order, norm="tanh", dtype=torch.float64)
        widths = [self.widths[0], *self.hidden, self.widths[-1]]
        layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in zip(widths, widths[1:], strict=False)]
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]


def _misfit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x) - y


# Second-order PINNs


def poisson(model: nn.Module, x: Tensor) -> Tensor:
    """-Lap u = d pi^2 prod sin(pi x)."""
    return -jet(model, x, collapse=True)[2] - x.shape[-1] * math.pi**2 * sines(x)


def sines(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(-1, keepdim=True)


def poisson_sum(model: nn.Module, x: Tensor) -> Tensor:
    """-Lap u = pi^2 sum cos(pi x)."""
    return -jet(model, x, collapse=True)[2] - math.pi**2 * cosines(x)


def cosines(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(-1, keepdim=True)


def heat(model: nn.Module, x: Tensor) -> Tensor:
    """u_t = Lap u / 4; time is the last coordinate."""
    _, slopes, second = jet(model, x, collapse=[1.0] * (x.shape[-1] - 1) + [0.0])
    return slopes[-1] - second / 4


def cooling(x: Tensor) -> Tensor:
    return torch.exp(-(math.pi**2) * x[..., 1:] / 4) * torch.sin(math.pi * x[..., :1])


def cooling_sum(x: Tensor) -> Tensor:
    return torch.exp(-x[..., -1:]) * torch.sin(2 * x[..., :-1]).sum(-1, keepdim=True)


def _walls(dimensions: int) -> Sides:
    return [(i, end) for i in range(dimensions) for end in ("low", "high")]


def _unit(dimensions: int) -> tuple[list[float], list[float]]:
    return [0.0] * dimensions, [1.0] * dimensions


def _random(dimensions: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(0, 1, (9000, dimensions)))


def _from_sine(residual: Callable[..., Tensor], exact: Callable[..., Tensor], test: Callable, **others) -> Equation:
    """In time, from sin(pi x), zero at x = 0 and 1."""
    walls = [*_walls(1), (1, "low")]
    distance = BoxDistance(*_unit(2), walls)
    return Equation(
        *_unit(2),
        residual,
        exact,
        distance,
        lambda x: torch.sin(math.pi * x[..., :1]),
        [],
        walls,
        900,
        120,
        test,
        **others,
    )


SECONDS = (1e-3, 1e-4, 1e-6)
ALL = ("KAN", "MLP", THEIRS)
PINNS = {
    "poisson_2": Subject(
        "Poisson, 2-d",
        Equation(*_unit(2), poisson, sines, BoxDistance(*_unit(2)), 0.0, [], _walls(2), 900, 120, lambda: _random(2)),
        [2, 4, 1],
        [64],
        120,
        "11 / 24 / 94 s; 6.1e-8",
        goals=SECONDS,
        methods=ALL,
    ),
    "heat_1": Subject(
        "heat, 1+1-d",
        _from_sine(heat, cooling, lambda: _random(2)),
        [2, 4, 1],
        [64],
        120,
        "9.3 / 27 / 96 s; 2.7e-8",
        goals=SECONDS,
        methods=ALL,
    ),
    "heat_4": Subject(
        "heat, 4+1-d",
        Equation(
            *_unit(5),
            heat,
            cooling_sum,
            lambda x: x[..., -1:],
            lambda x: torch.sin(2 * x[..., :-1]).sum(-1, keepdim=True),
            _walls(4),
            [*_walls(4), (4, "low")],
            3000,
            500,
            lambda: _random(5),
        ),
        [5, 4, 1],
        [64],
        120,
        "8.3 / 33 / 1,130 s; 7.4e-7",
        goals=SECONDS,
        methods=ALL,
    ),
    "poisson_5": Subject(
        "Poisson, 5-d",
        Equation(*_unit(5), poisson_sum, cosines, None, 0.0, _walls(5), _walls(5), 3000, 500, lambda: _random(5)),
        [5, 4, 1],
        [64],
        120,
        "18 / 40 / 80 s; 5.6e-8",
        goals=SECONDS,
        methods=ALL,
    ),
}


# The diffusion equation of jaxKAN's paper


def diffusion(model: nn.Module, x: Tensor) -> Tensor:
    """u_t = u_xx + (pi^2 - 1) exp(-t) sin(pi x)."""
    _, (_, rate), second = jet(model, x, collapse=(1.0, 0.0))
    return rate - second - (math.pi**2 - 1) * diffused(x)


def diffused(x: Tensor) -> Tensor:
    return torch.exp(-x[..., 1:]) * torch.sin(math.pi * x[..., :1])


def _grid() -> Tensor:
    return torch.cartesian_prod(*(torch.linspace(0, 1, size, dtype=torch.float64) for size in (256, 100)))


DIFFUSION = Subject(
    "diffusion, u = exp(-t) sin(pi x)",
    _from_sine(diffusion, diffused, _grid, measure="relative"),
    [2, 4, 1],
    [64],
    120,
    "2.1e-4, 1,241 s",
)
