# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Four families of PDEs, each with one parameter, its residuals, and reference solutions by spectral methods.

The domain of all four is the square [-1, 1]^2: two dimensions of space, or space x time, where time t in [0, 1] is
2 t - 1. A family gives the residual terms that `peft_lotra.least_squares.LevenbergMarquardt` and Adam minimize, and
`reference(parameter)`, a solution without KANs: Chebyshev collocation (elliptic), or Fourier collocation in space and
DOP853 from scipy in time (the others). `python examples/studies/pde/ten.py --references` prints the errors of the
references: the difference to twice the resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.fft import fft, fftfreq, ifft
from scipy.integrate import solve_ivp
from scipy.interpolate import BarycentricInterpolator
from torch import Tensor, nn

from peft_lotra.kan import jet


GRID = 81  # points of the test grid in each direction


@dataclass(frozen=True, eq=False)
class Family:
    """
    A family of PDEs.

    Attributes:
        name, title, parameter_name: for messages and figures.
        base: the parameter of the pre-trained network.
        targets: near, middle and far.
        terms: `terms(parameter, generator, points)` returns the residual terms (function, rows, weight).
        solve: `solve(parameter, resolution)` returns the solution on the test grid, (GRID, GRID): first axis x.
        resolution: the resolution of `reference`.
    """

    name: str
    title: str
    parameter_name: str
    base: float
    targets: dict[str, float]
    terms: Callable[[float, torch.Generator, int], list[tuple]]
    solve: Callable[[float, int], np.ndarray]
    resolution: int

    def reference(self, parameter: float) -> Tensor:
        """The solution on `test_points()`, (GRID^2, 1)."""
        return torch.from_numpy(_solve(self, parameter, self.resolution)).reshape(-1, 1)

    def reference_error(self, parameter: float) -> float:
        """The relative L2 difference to the solution of twice the resolution."""
        coarse, fine = (_solve(self, parameter, self.resolution * factor) for factor in (1, 2))
        return float(np.linalg.norm(coarse - fine) / np.linalg.norm(fine))


@cache
def _solve(family: Family, parameter: float, resolution: int) -> np.ndarray:
    return family.solve(parameter, resolution)


def axis() -> np.ndarray:
    """The test grid in each direction."""
    return np.linspace(-1, 1, GRID)


def test_points() -> Tensor:
    """(GRID^2, 2), the first coordinate varies slowest."""
    line = torch.from_numpy(axis())
    return torch.cartesian_prod(line, line)


def relative_error(model: nn.Module, solution: Tensor) -> float:
    """The relative L2 error on the test grid."""
    with torch.no_grad():
        return ((model(test_points()) - solution).norm() / solution.norm()).item()


# Points


def sobol(generator: torch.Generator, points: int) -> Tensor:
    """Scrambled Sobol points, which cover the square more evenly than independent points."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(points, dtype=torch.float64) * 2 - 1


def edge(fixed: int, value: float, points: int) -> Tensor:
    """Chebyshev points on the edge where the coordinate `fixed` has the given value."""
    line = torch.cos(math.pi * (torch.arange(points, dtype=torch.float64) + 0.5) / points)
    ends = torch.full_like(line, value)
    return torch.stack([ends, line] if fixed == 0 else [line, ends], dim=1)


# Residuals. Functions of (model, *rows) for any number of rows, so that Adam may take all and vmap one.


def data(model: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    """Boundary and initial values."""
    return model(x) - u


def flux(model: nn.Module, x: Tensor) -> Tensor:
    """A Neumann condition: the derivative in x is zero."""
    return jet(model, x, torch.eye(2, dtype=x.dtype)[:1])[1][0]


def elliptic(model: nn.Module, x: Tensor, drift: Tensor, source: Tensor) -> Tensor:
    """-(lap u + grad(log a) grad u) = f / a."""
    _, (u_x, u_y), laplacian = jet(model, x, collapse=True)
    return -laplacian - drift[:, :1] * u_x - drift[:, 1:] * u_y - source


# Elliptic: -div(a grad u) = f, u = 0 on the boundary; a = exp(k sin(pi x) cos(pi y)), f = u_0's for k = 0, where
# u_0 = cos(pi x / 2) cos(pi y / 2).


def coefficient(k: float, x, y, module):
    """log a and its gradient."""
    pi = math.pi
    log_a = k * module.sin(pi * x) * module.cos(pi * y)
    return log_a, pi * k * module.cos(pi * x) * module.cos(pi * y), -pi * k * module.sin(pi * x) * module.sin(pi * y)


def source_of(x, y, module):
    return math.pi**2 / 2 * module.cos(math.pi * x / 2) * module.cos(math.pi * y / 2)


def elliptic_terms(k: float, generator: torch.Generator, points: int) -> list[tuple]:
    # An error on the boundary enters the solution in full, a residual of the equation after two integrations, by at
    # most a fifth. With the weight 100 of the other families, most of the error came from the boundary.
    x = sobol(generator, points)
    log_a, slope_x, slope_y = coefficient(k, x[:, :1], x[:, 1:], torch)
    source = source_of(x[:, :1], x[:, 1:], torch) * torch.exp(-log_a)
    border = torch.cat([edge(fixed, value, points // 20) for fixed in (0, 1) for value in (-1.0, 1.0)])
    return [
        (elliptic, (x, torch.cat([slope_x, slope_y], dim=1), source), 1.0),
        (data, (border, torch.zeros_like(border[:, :1])), 1000.0),
    ]


def chebyshev(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points x_j = cos(pi j / n) and the differentiation matrix (L. N. Trefethen, "Spectral Methods in MATLAB", 6)."""
    x = np.cos(math.pi * np.arange(n + 1) / n)
    c = np.r_[2, np.ones(n - 1), 2] * (-1.0) ** np.arange(n + 1)
    matrix = np.outer(c, 1 / c) / (x[:, None] - x[None] + np.eye(n + 1))
    return x, matrix - np.diag(matrix.sum(1))


def solve_elliptic(k: float, resolution: int) -> np.ndarray:
    """The values at the inner points by collocation, interpolated to the test grid."""
    x, derivative = chebyshev(resolution)
    inner = slice(1, -1)
    first, second = derivative[inner, inner], (derivative @ derivative)[inner, inner]
    eye = np.eye(resolution - 1)
    px, py = (p.ravel() for p in np.meshgrid(x[inner], x[inner], indexing="ij"))
    log_a, slope_x, slope_y = coefficient(k, px, py, np)
    operator = np.kron(second, eye) + np.kron(eye, second)
    operator += slope_x[:, None] * np.kron(first, eye) + slope_y[:, None] * np.kron(eye, first)
    values = np.linalg.solve(-operator, source_of(px, py, np) * np.exp(-log_a))
    full = np.zeros((resolution + 1, resolution + 1))
    full[1:-1, 1:-1] = values.reshape(resolution - 1, -1)
    for side in range(2):
        full = BarycentricInterpolator(chebyshev(resolution)[0], full, axis=side)(axis())
    return full


# Evolution equations u_t = D u_xx + R(u, u_x), 2-periodic in x, and odd or even: u or u_x is zero at x = -1 and 1.


def evolution_terms(
    name: str,
    diffusion: float,
    reaction: Callable,
    initial: Callable,
    odd: bool,
    generator: torch.Generator,
    points: int,
) -> list[tuple]:
    def equation(model: nn.Module, x: Tensor) -> Tensor:
        u, (u_x, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return 2 * u_t - diffusion * u_xx - reaction(u, u_x)  # the second coordinate is 2 t - 1

    equation.__name__ = name
    start = edge(1, -1.0, points // 8)
    border = torch.cat([edge(0, value, points // 20) for value in (-1.0, 1.0)])
    return [
        (equation, (sobol(generator, points),), 1.0),
        (data, (start, initial(start[:, :1], torch)), 100.0),
        (data, (border, torch.zeros_like(border[:, :1])), 100.0) if odd else (flux, (border,), 1.0),
    ]


def solve_evolution(diffusion: float, reaction: Callable, initial: Callable, resolution: int) -> np.ndarray:
    """Fourier collocation in space, DOP853 in time; on the test grid by trigonometric interpolation."""
    x = -1 + 2 * np.arange(resolution) / resolution
    wave = 1j * math.pi * fftfreq(resolution, 1 / resolution)
    slope = np.where(np.arange(resolution) == resolution // 2, 0, wave)  # the highest mode has no odd derivative

    def rate(_, u):
        spectrum = fft(u)
        u_x, u_xx = ifft(slope * spectrum).real, ifft(wave**2 * spectrum).real
        return diffusion * u_xx + reaction(u, u_x)

    times = (axis() + 1) / 2
    solution = solve_ivp(rate, (0, 1), initial(x, np), "DOP853", times, rtol=1e-10, atol=1e-12)
    spectrum = fft(solution.y, axis=0) / resolution
    return (np.exp(np.outer(axis() + 1, wave)) @ spectrum).real


def _evolution(equation: Callable[[float], tuple[float, Callable]], initial: Callable, odd: bool, **kwargs) -> Family:
    """`equation(parameter)` returns D and R."""

    def terms(parameter: float, generator: torch.Generator, points: int) -> list[tuple]:
        return evolution_terms(kwargs["name"], *equation(parameter), initial, odd, generator, points)

    def solve(parameter: float, resolution: int) -> np.ndarray:
        return solve_evolution(*equation(parameter), initial, resolution)

    return Family(terms=terms, solve=solve, **kwargs)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="elliptic",
            title="-div(a grad u) = f, a = exp(k sin(pi x) cos(pi y))",
            parameter_name="contrast k",
            base=0.5,
            targets={"near": 0.7, "middle": 1.2, "far": 2.0},
            terms=elliptic_terms,
            solve=solve_elliptic,
            resolution=36,
        ),
        _evolution(
            lambda d: (d, lambda u, u_x: 4 * (u - u**3)),
            lambda x, module: 0.8 * module.sin(math.pi * x) + 0.2 * module.sin(2 * math.pi * x),
            odd=True,
            name="allen_cahn",
            title="u_t = d u_xx + 4 (u - u^3)",
            parameter_name="diffusion d",
            base=0.05,
            targets={"near": 0.04, "middle": 0.025, "far": 0.01},
            resolution=256,
        ),
        _evolution(
            lambda r: (0.05, lambda u, u_x: r * u * (1 - u)),
            lambda x, module: module.exp(4 * (module.cos(math.pi * x) - 1)),
            odd=False,
            name="reaction_diffusion",
            title="u_t = 0.05 u_xx + r u (1 - u)",
            parameter_name="growth r",
            base=2.0,
            targets={"near": 2.5, "middle": 4.0, "far": 6.0},
            resolution=128,
        ),
        _evolution(
            lambda nu: (nu, lambda u, u_x: -u * u_x),
            lambda x, module: -module.sin(math.pi * x),
            odd=True,
            name="burgers",
            title="u_t + u u_x = nu u_xx",
            parameter_name="viscosity nu",
            base=0.1,
            targets={"near": 0.08, "middle": 0.05, "far": 0.03},
            resolution=256,
        ),
    )
}
