# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Two families of PDEs with exact boundary and initial values inside of the residual, and their references.

Burgers: u = -sin(pi x) + t (1 - x^2) N(x, s), t = (s + 1) / 2. Elliptic: u = (1 - x^2) (1 - y^2) N(x, y). The
equations and the spectral references are those of examples/studies/pde/problems/families.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt


sys.path.insert(0, str(Path(__file__).parents[1] / "pde"))
from problems import families  # noqa: E402


@dataclass(frozen=True)
class Problem:
    """A family with one parameter c in `low` to `high`.

    Attributes:
        residual: The residual (n, 1) of a network at rows (x, c); see `third_input` for networks of (x, c).
        solution: The solution (n, 1) by the values of the network.
        base: The parameter of the base, reached through `before`.
    """

    name: str
    low: float
    high: float
    base: float
    before: tuple[float, ...]
    residual: Callable[[nn.Module, Tensor, Tensor], Tensor]
    solution: Callable[[Tensor, Tensor], Tensor]

    def terms_of(self, c: float, points: int = 1500, seed: int = 0) -> list[tuple]:
        x = families.sobol(torch.Generator().manual_seed(seed), points)
        return [(self.residual, (x, torch.full_like(x[:, :1], c)))]

    def held_out(self, model: nn.Module, c: float, points: int = 1500) -> float:
        """The root mean square of the residual at points that no fit has."""
        x = families.sobol(torch.Generator().manual_seed(12345), points)
        return self.residual(model, x, torch.full_like(x[:, :1], c)).square().mean().sqrt().item()

    def error(self, evaluate: Callable[[Tensor], Tensor], c: float) -> float:
        """The relative L2 error of a network on the test grid."""
        x, reference = families.test_points(), reference_of(self.name, c)
        with torch.no_grad():
            return ((self.solution(x, evaluate(x)) - reference).norm() / reference.norm()).item()

    def pretrained(self, seed: int, points: int, steps: int) -> KAN:
        torch.manual_seed(seed)
        base = KAN([2, 10, 10, 1], 8, dtype=torch.float64)
        for c in (*self.before, self.base):
            terms = self.terms_of(c, points, seed)
            count = steps if c == self.base else steps // 3
            LevenbergMarquardt(base, floor=1e-6).fit(terms, count, progress=False)
        return base


@cache
def reference_of(name: str, c: float) -> Tensor:
    return families.FAMILIES[name].reference(c)


def _jet(model: nn.Module, x: Tensor, c: Tensor, weights: Tensor | tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, both first derivatives and the weighted second derivative, of a network of x or of (x, c)."""
    if getattr(model, "takes_parameter", False):
        rows, directions = torch.cat([x, model.scaled(c)], dim=1), torch.eye(3, dtype=x.dtype)[:2]
    else:
        rows, directions = x, None
    value, (first, second), sum_of_second = jet(model, rows, directions, collapse=weights)
    return value, first, second, sum_of_second


def burgers(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """u_t + u u_x - c u_xx."""
    n, n_x, n_s, n_xx = _jet(model, x, c, (1.0, 0.0))
    place, t = x[:, :1], (x[:, 1:] + 1) / 2
    zero = 1 - place**2
    u = -torch.sin(math.pi * place) + t * zero * n
    u_x = -math.pi * torch.cos(math.pi * place) + t * (zero * n_x - 2 * place * n)
    u_xx = math.pi**2 * torch.sin(math.pi * place) + t * (zero * n_xx - 4 * place * n_x - 2 * n)
    return zero * n + 2 * t * zero * n_s + u * u_x - c * u_xx


def burgers_solution(x: Tensor, n: Tensor) -> Tensor:
    return -torch.sin(math.pi * x[:, :1]) + (x[:, 1:] + 1) / 2 * (1 - x[:, :1] ** 2) * n


def elliptic(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """-(lap u + grad(log a) grad u) - f / a, a = exp(c sin(pi x) cos(pi y))."""
    n, n_x, n_y, laplacian = _jet(model, x, c, (1.0, 1.0))
    px, py = x[:, :1], x[:, 1:]
    bx, by = 1 - px**2, 1 - py**2
    u_x, u_y = -2 * px * by * n + bx * by * n_x, -2 * py * bx * n + bx * by * n_y
    lap = -2 * (bx + by) * n - 4 * (px * by * n_x + py * bx * n_y) + bx * by * laplacian
    log_a, slope_x, slope_y = families._coefficient(c, px, py, torch)
    return -lap - slope_x * u_x - slope_y * u_y - families._source(px, py, torch) * torch.exp(-log_a)


def elliptic_solution(x: Tensor, n: Tensor) -> Tensor:
    return (1 - x[:, :1] ** 2) * (1 - x[:, 1:] ** 2) * n


PROBLEMS = {
    "burgers": Problem("burgers", 0.02, 0.06, 0.036, (0.15, 0.07), burgers, burgers_solution),
    "elliptic": Problem("elliptic", 0.2, 1.0, 0.6, (), elliptic, elliptic_solution),
}


def held_out(name: str) -> Callable[[nn.Module, float], float]:
    """The indicator of a `ParametricAdapter`, picklable."""
    return PROBLEMS[name].held_out


def terms_of(name: str, points: int, seed: int) -> Callable[[float], list[tuple]]:
    """What a `ParametricAdapter` takes, picklable."""
    return partial(PROBLEMS[name].terms_of, points=points, seed=seed)
