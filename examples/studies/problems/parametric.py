# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families of PDEs with exact boundary and initial values inside of the residual, and their references.

Burgers: u = -a sin(pi x) + t (1 - x^2) N(x, s), t = (s + 1) / 2. Elliptic: u = (1 - x^2) (1 - y^2) N(x, y). The
equations and the spectral references are those of families.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt
from problems import families


Parameter = float | tuple[float, ...]


@dataclass(frozen=True)
class Problem:
    """A family with one parameter or more, in `low` to `high`.

    Attributes:
        log: Whether it is smooth in the logarithm, for each parameter.
        base: The parameter of the base, reached through `before`.
        residual: The residual (n, 1) of a network at rows (x, c), c (n, parameters); see `takes_parameter` below.
        solution: The solution (n, 1) by rows x, the values of the network, and the parameter.
        reference: The solution on the test grid, (GRID, GRID).
    """

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    log: tuple[bool, ...]
    base: tuple[float, ...]
    before: tuple[tuple[float, ...], ...]
    residual: Callable[[nn.Module, Tensor, Tensor], Tensor]
    solution: Callable[[Tensor, Tensor, tuple[float, ...]], Tensor]
    reference: Callable[..., np.ndarray]

    def terms_of(self, c: Parameter, points: int = 1500, seed: int = 0) -> list[tuple]:
        x = families.sobol(torch.Generator().manual_seed(seed), points)
        return [(self.residual, (x, torch.tensor([as_tuple(c)], dtype=x.dtype).expand(points, -1)))]

    def error(self, evaluate: Callable[[Tensor], Tensor], c: Parameter) -> float:
        """The relative L2 error of a network on the test grid."""
        x, reference = families.test_points(), _reference_of(self.name, as_tuple(c))
        with torch.no_grad():
            u = self.solution(x, evaluate(x), as_tuple(c))
        return ((u - reference).norm() / reference.norm()).item()

    def values_of(self, model: nn.Module, c: Parameter) -> Tensor:
        """The solution at some points, whose error the indicator estimates."""
        x = families.sobol(torch.Generator().manual_seed(4242), 128)
        return self.solution(x, model(x), as_tuple(c))

    def pretrained(self, seed: int, points: int, steps: int) -> KAN:
        torch.manual_seed(seed)
        base = KAN([2, 10, 10, 1], 8, dtype=torch.float64)
        for c in (*self.before, self.base):
            terms = self.terms_of(c, points, seed)
            count = steps if c == self.base else steps // 3
            LevenbergMarquardt(base, floor=1e-6).fit(terms, count, progress=False)
        return base

    def spaced(self, count: int) -> list[Parameter]:
        """About `count` parameters on a uniform grid."""
        most = round(count ** (1 / len(self.low)))
        axes = [
            (np.geomspace if log else np.linspace)(low, high, most)
            for low, high, log in zip(self.low, self.high, self.log, strict=True)
        ]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes)).tolist()
        return [as_parameter(point) for point in points]


def as_tuple(c: Parameter) -> tuple[float, ...]:
    return c if isinstance(c, tuple) else (c,)


def as_parameter(point: list[float] | tuple[float, ...]) -> Parameter:
    return tuple(point) if len(point) > 1 else point[0]


@cache
def _reference_of(name: str, c: tuple[float, ...]) -> Tensor:
    return torch.from_numpy(PROBLEMS[name].reference(*c)).reshape(-1, 1)


def _jet(model: nn.Module, x: Tensor, c: Tensor, weights: Tensor | tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, both first derivatives and the weighted second derivative, of a network of x or of (x, c)."""
    if getattr(model, "takes_parameter", False):
        rows = torch.cat([x, model.scaled(c)], dim=1)
        directions = torch.eye(rows.shape[1], dtype=x.dtype)[:2]
    else:
        rows, directions = x, None
    value, (first, second), sum_of_second = jet(model, rows, directions, collapse=weights)
    return value, first, second, sum_of_second


def burgers(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx for c = (nu), or (nu, a)."""
    nu, a = c[:, :1], c[:, 1:] if c.shape[1] > 1 else 1.0
    n, n_x, n_s, n_xx = _jet(model, x, c, (1.0, 0.0))
    place, t = x[:, :1], (x[:, 1:] + 1) / 2
    zero = 1 - place**2
    u = -a * torch.sin(math.pi * place) + t * zero * n
    u_x = -math.pi * a * torch.cos(math.pi * place) + t * (zero * n_x - 2 * place * n)
    u_xx = math.pi**2 * a * torch.sin(math.pi * place) + t * (zero * n_xx - 4 * place * n_x - 2 * n)
    return zero * n + 2 * t * zero * n_s + u * u_x - nu * u_xx


def burgers_solution(x: Tensor, n: Tensor, c: tuple[float, ...]) -> Tensor:
    a = c[1] if len(c) > 1 else 1.0
    return -a * torch.sin(math.pi * x[:, :1]) + (x[:, 1:] + 1) / 2 * (1 - x[:, :1] ** 2) * n


def burgers_reference(nu: float, a: float = 1.0) -> np.ndarray:
    return families.solve_evolution(
        nu, lambda u, u_x: -u * u_x, lambda x, module: -a * module.sin(math.pi * x), resolution=256
    )


def elliptic(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """-(lap u + grad(log a) grad u) - f / a, a = exp(c sin(pi x) cos(pi y))."""
    n, n_x, n_y, laplacian = _jet(model, x, c, (1.0, 1.0))
    px, py = x[:, :1], x[:, 1:]
    bx, by = 1 - px**2, 1 - py**2
    u_x, u_y = -2 * px * by * n + bx * by * n_x, -2 * py * bx * n + bx * by * n_y
    lap = -2 * (bx + by) * n - 4 * (px * by * n_x + py * bx * n_y) + bx * by * laplacian
    log_a, slope_x, slope_y = families.coefficient(c, px, py, torch)
    return -lap - slope_x * u_x - slope_y * u_y - families.source_of(px, py, torch) * torch.exp(-log_a)


def elliptic_solution(x: Tensor, n: Tensor, c: tuple[float, ...]) -> Tensor:
    return (1 - x[:, :1] ** 2) * (1 - x[:, 1:] ** 2) * n


def elliptic_reference(c: float) -> np.ndarray:
    return families.solve_elliptic(c, resolution=36)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            name="burgers",
            low=(0.02,),
            high=(0.06,),
            log=(True,),
            base=(0.036,),
            before=((0.15,), (0.07,)),
            residual=burgers,
            solution=burgers_solution,
            reference=burgers_reference,
        ),
        Problem(
            name="elliptic",
            low=(0.2,),
            high=(1.0,),
            log=(False,),
            base=(0.6,),
            before=(),
            residual=elliptic,
            solution=elliptic_solution,
            reference=elliptic_reference,
        ),
        # viscosity and amplitude
        Problem(
            name="burgers_two",
            low=(0.03, 0.8),
            high=(0.06, 1.2),
            log=(True, False),
            base=(0.042, 1.0),
            before=((0.15, 1.0), (0.07, 1.0)),
            residual=burgers,
            solution=burgers_solution,
            reference=burgers_reference,
        ),
    )
}


def family_of(base: nn.Module, name: str, points: int, seed: int) -> ParametricAdapter:
    """A family of adapters, which is picklable; its indicator has two thirds as many points of its own."""
    problem = PROBLEMS[name]
    return ParametricAdapter(
        base,
        partial(problem.terms_of, points=points, seed=seed),
        ranks=8,
        held_terms_of=partial(problem.terms_of, points=points * 2 // 3, seed=seed + 1000),
        values_of=problem.values_of,
        log=problem.log,
    )
