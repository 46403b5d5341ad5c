# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Seven standard problems in space and time, or in two space dimensions, each with an independent reference.

A problem is its domain, its exact conditions (distance and lift of `HardConstraint`), its residual, and the parameter
by which continuation reaches it. Burgers and Allen-Cahn are solved on x >= 0: their data are odd and even, and the
errors on the half are those on the whole domain. References do not use KANs: the Cole-Hopf integral, Chebyshev
collocation with Radau, Fourier collocation with DOP853, or the exact solution. `python
examples/studies/pde/ten.py --references` prints their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.fft import fft, ifft
from scipy.integrate import solve_ivp
from scipy.interpolate import BarycentricInterpolator
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, side_points
from peft_lotra.pde.features import BoxFeatures
from problems.families import chebyshev


NX, NT = 256, 101  # the test grid
WALLS = [(0, "low"), (0, "high")]
START = (1, "low")


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        start, stop: the parameter where continuation starts, and that of the problem.
        residual: (model, x, parameter) to residuals (n, m), without weights.
        distance, lift: of the exact conditions.
        solve: the reference at a resolution, for a parameter, (NX, NT) on the whole domain.
        resolution: what is fine enough.
        terms: conditions that are terms of the loss.
        outputs: of the network; the first one is the solution.
        half: whether the network solves x >= 0 of the symmetric domain [-high, high].
    """

    name: str
    title: str
    low: tuple[float, float]
    high: tuple[float, float]
    start: float
    stop: float
    residual: Callable[[nn.Module, Tensor, float], Tensor]
    distance: Callable[[Tensor], Tensor]
    lift: Callable[[Tensor], Tensor]
    solve: Callable[[int, float], np.ndarray]
    resolution: int
    features: BoxFeatures
    terms: Callable[[], list[tuple]] = list
    outputs: int = 1
    half: bool = False

    def points(self) -> Tensor:
        """The test points (n, 2) of the network's domain, x varies slowest."""
        low = -self.high[0] if self.half else self.low[0]
        x = torch.linspace(low, self.high[0], NX, dtype=torch.float64)
        t = torch.linspace(self.low[1], self.high[1], NT, dtype=torch.float64)
        return torch.cartesian_prod(x[NX // 2 :] if self.half else x, t)

    def reference(self) -> Tensor:
        """The solution at the test points, (n, 1)."""
        solution = _solved(self, self.resolution)
        return torch.from_numpy(solution[NX // 2 :] if self.half else solution).reshape(-1, 1)

    def reference_error(self) -> float:
        """The relative L2 difference of the reference to that of a resolution of 1.5 times."""
        coarse, fine = (_solved(self, round(self.resolution * factor)) for factor in (1, 1.5))
        return float(np.linalg.norm(coarse - fine) / np.linalg.norm(fine))

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """The relative L2 error on the test grid."""
        solution = self.reference()
        return ((model(self.points())[:, :1] - solution).norm() / solution.norm()).item()


@cache
def _solved(problem: Problem, resolution: int) -> np.ndarray:
    return problem.solve(resolution, problem.stop)


def axes_of(low: tuple[float, float], high: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(low[0], high[0], NX), np.linspace(low[1], high[1], NT)


# Burgers' equation: u_t + u u_x = nu u_xx, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0


def burgers(model: nn.Module, x: Tensor, nu: float) -> Tensor:
    u, (u_x, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t + u * u_x - nu * u_xx


def cole_hopf(x: np.ndarray, t: np.ndarray, nu: float, nodes: int = 2000) -> np.ndarray:
    """Return the exact solution; the Gaussian integral by the trapezoidal rule, which converges exponentially."""
    reach = 4 + 0.5 / math.sqrt(nu)  # characteristics are no longer than 1, which is 2 sqrt(nu) z at t = 1
    z = np.linspace(-reach, reach, nodes)
    y = x[..., None] - np.sqrt(4 * nu * t)[..., None] * z
    exponent = -np.cos(math.pi * y) / (2 * math.pi * nu) - z**2
    kernel = np.exp(exponent - exponent.max(-1, keepdims=True))
    return -(np.sin(math.pi * y) * kernel).sum(-1) / kernel.sum(-1)


def exact_burgers(nodes: int, nu: float) -> np.ndarray:
    x, t = axes_of((-1, 0), (1, 1))
    return cole_hopf(x[:, None], t, nu, nodes)


# Allen-Cahn: u_t = d u_xx + 5 (u - u^3), u(x, 0) = x^2 cos(pi x), u(-1, t) = u(1, t) = -1


def allen_cahn(model: nn.Module, x: Tensor, d: float) -> Tensor:
    u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t - d * u_xx - 5 * (u - u**3)


def flux(model: nn.Module, x: Tensor) -> Tensor:
    """u_x = 0."""
    return jet(model, x, torch.eye(2, dtype=x.dtype)[:1])[1][0]


def middle() -> list[tuple]:
    """The even solution has no slope at x = 0."""
    return [(flux, (side_points((0, 0), (1, 1), 100, [(0, "low")])[0],), 0.1)]


def solve_allen_cahn(n: int, d: float) -> np.ndarray:
    nodes, slope = chebyshev(n)
    second = (slope @ slope)[1:-1]
    x, t = axes_of((-1, 0), (1, 1))
    edge = second[:, 0] + second[:, -1]

    def rate(_, u: np.ndarray) -> np.ndarray:
        return d * (second[:, 1:-1] @ u - edge) + 5 * (u - u**3)

    def jacobian(_, u: np.ndarray) -> np.ndarray:
        return d * second[:, 1:-1] + np.diag(5 - 15 * u**2)

    start = (nodes**2 * np.cos(math.pi * nodes))[1:-1]
    found = solve_ivp(rate, (0, 1), start, "Radau", t, jac=jacobian, rtol=1e-7, atol=1e-9).y
    full = np.vstack([-np.ones(NT), found, -np.ones(NT)])
    return BarycentricInterpolator(nodes, full)(x)


# Helmholtz: u_xx + u_yy + u = q, u = 0 on the boundary, u = sin(pi x) sin(k pi y) with k = 4


def helmholtz(model: nn.Module, x: Tensor, k: float) -> Tensor:
    u, _, laplacian = jet(model, x, collapse=True)
    factor = 1 - (1 + k**2) * math.pi**2
    return laplacian + u - factor * torch.sin(math.pi * x[:, :1]) * torch.sin(k * math.pi * x[:, 1:])


def exact_helmholtz(_: int, k: float) -> np.ndarray:
    x, y = axes_of((-1, -1), (1, 1))
    return np.sin(math.pi * x)[:, None] * np.sin(k * math.pi * y)


# Korteweg-de Vries: u_t + u u_x + e u_xxx = 0, u(x, 0) = cos(pi x), 2-periodic; a second output w = e u_xx, whose
# equation counts 1 / sqrt(e) times, since sqrt(e) is the length over which the first one differentiates w


def korteweg_de_vries(model: nn.Module, x: Tensor, e: float) -> Tensor:
    (values, (slope, rate), second) = jet(model, x, collapse=(1.0, 0.0))
    u, w = values[:, :1], values[:, 1:]
    return torch.cat([rate[:, :1] + u * slope[:, :1] + slope[:, 1:], (w - e * second[:, :1]) / math.sqrt(e)], 1)


def solve_korteweg_de_vries(n: int, e: float) -> np.ndarray:
    """Fourier collocation; the third derivative by an integrating factor."""
    wave = 1j * math.pi * np.fft.fftfreq(n, 1 / n)
    wave[n // 2] = 0
    x, t = axes_of((-1, 0), (1, 1))

    def rate(time: float, v: np.ndarray) -> np.ndarray:
        factor = np.exp(e * wave**3 * time)
        return -wave / 2 * factor * fft(ifft(v / factor).real ** 2)

    start = fft(np.cos(math.pi * (-1 + 2 * np.arange(n) / n)))
    found = solve_ivp(rate, (0, 1), start, "DOP853", t, rtol=1e-9, atol=1e-9).y
    found = found / np.exp(e * wave[:, None] ** 3 * t) / n
    return (np.exp(np.outer(x + 1, wave)) @ found).real


# sine-Gordon: u_tt = u_xx - 20 sin(u), u(x, 0) = 2 sin(pi x) + sin(2 pi x), u_t(x, 0) = 0, u = 0 at x = -1 and 1


def sine_gordon(model: nn.Module, x: Tensor, k: float) -> Tensor:
    u, _, wave = jet(model, x, collapse=(-1.0, 1.0))
    return wave + k * torch.sin(u)


def solve_sine_gordon(n: int, k: float) -> np.ndarray:
    wave = 1j * math.pi * np.fft.fftfreq(n, 1 / n)
    x, t = axes_of((-1, 0), (1, 1))

    def rate(_, state: np.ndarray) -> np.ndarray:
        u, velocity = np.split(state, 2)
        return np.r_[velocity, ifft(wave**2 * fft(u)).real - k * np.sin(u)]

    nodes = -1 + 2 * np.arange(n) / n
    start = np.r_[2 * np.sin(math.pi * nodes) + np.sin(2 * math.pi * nodes), np.zeros(n)]
    found = fft(solve_ivp(rate, (0, 1), start, "DOP853", t, rtol=1e-9, atol=1e-11).y[:n], axis=0) / n
    return (np.exp(np.outer(x + 1, wave)) @ found).real


# Advection: u_t + c u_x = 0, u(x, 0) = sin(x), 2 pi-periodic; the example of A. Krishnapriyan et al., "Characterizing
# possible failure modes in physics-informed neural networks", arXiv 2109.01050, at its c = 30


def advection(model: nn.Module, x: Tensor, c: float) -> Tensor:
    _, (u_x, u_t), _ = jet(model, x, collapse=True)
    return u_t + c * u_x


def exact_advection(_: int, c: float) -> np.ndarray:
    x, t = axes_of((0, 0), (2 * math.pi, 1))
    return np.sin(x[:, None] - c * t)


# Fisher's equation: u_t = 5 u_xx + r u (1 - u), 2 pi-periodic, of the same paper, at its r = 5; the start is its
# Gaussian of deviation pi / 4 around pi, made periodic


def fisher(model: nn.Module, x: Tensor, r: float) -> Tensor:
    u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t - 5 * u_xx - r * u * (1 - u)


def solve_fisher(n: int, r: float) -> np.ndarray:
    wave = 1j * np.fft.fftfreq(n, 1 / n)
    x, t = axes_of((0, 0), (2 * math.pi, 1))

    def rate(_, u: np.ndarray) -> np.ndarray:
        return 5 * ifft(wave**2 * fft(u)).real + r * u * (1 - u)

    start = np.exp(-16 / math.pi**2 * (1 + np.cos(2 * math.pi * np.arange(n) / n)))
    found = fft(solve_ivp(rate, (0, 1), start, "Radau", t, rtol=1e-8, atol=1e-10).y, axis=0) / n
    return (np.exp(np.outer(x, wave)) @ found).real


def _bump(x: Tensor) -> Tensor:
    return torch.exp(-16 / math.pi**2 * (1 + torch.cos(x[..., :1])))


def _time(x: Tensor) -> Tensor:
    return x[..., 1:]


def _sine(factor: float, times: float, x: Tensor) -> Tensor:
    return factor * torch.sin(times * math.pi * x[..., :1])


def _cosine(x: Tensor) -> Tensor:
    start = torch.cos(math.pi * x[..., :1])
    return torch.cat([start, torch.zeros_like(start)], -1)


def since_start(x: Tensor) -> Tensor:
    """For u, which is given at the start, and for w, which is not."""
    return torch.cat([x[..., 1:], torch.ones_like(x[..., :1])], -1)


UNIT, SQUARE = ((0.0, 0.0), (1.0, 1.0)), ((-1.0, -1.0), (1.0, 1.0))
EVOLUTION = ((-1.0, 0.0), (1.0, 1.0))
CIRCLE = ((0.0, 0.0), (2 * math.pi, 1.0))
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "burgers",
            "Burgers, viscosity 0.01/pi",
            *UNIT,
            start=0.1,
            stop=0.01 / math.pi,
            residual=burgers,
            distance=BoxDistance(*UNIT, [*WALLS, START]),
            lift=partial(_sine, -1.0, 1.0),
            solve=exact_burgers,
            resolution=2000,
            features=BoxFeatures(*UNIT),
            half=True,
        ),
        Problem(
            "allen_cahn",
            "Allen-Cahn, diffusion 1e-4",
            *UNIT,
            start=0.02,
            stop=1e-4,
            residual=allen_cahn,
            distance=lambda x: x[..., 1:] * (1 - x[..., :1] ** 2),  # even, as the solution
            lift=lambda x: x[..., :1] ** 2 * torch.cos(math.pi * x[..., :1]),
            solve=solve_allen_cahn,
            resolution=400,
            features=BoxFeatures(*UNIT),
            terms=middle,
            half=True,
        ),
        Problem(
            "helmholtz",
            "Helmholtz, waves (1, 4)",
            *SQUARE,
            start=4.0,
            stop=4.0,
            residual=helmholtz,
            distance=BoxDistance(*SQUARE),
            lift=lambda x: torch.zeros_like(x[..., :1]),
            solve=exact_helmholtz,
            resolution=1,
            features=BoxFeatures(*SQUARE),
        ),
        Problem(
            "korteweg_de_vries",
            "Korteweg-de Vries, dispersion 0.0025",
            *EVOLUTION,
            start=0.05,
            stop=0.0025,
            residual=korteweg_de_vries,
            distance=since_start,
            lift=_cosine,
            solve=solve_korteweg_de_vries,
            resolution=256,
            features=BoxFeatures(*EVOLUTION, periodic=[0]),
            outputs=2,
        ),
        Problem(
            "sine_gordon",
            "sine-Gordon, force 20",
            *EVOLUTION,
            start=1.0,
            stop=20.0,
            residual=sine_gordon,
            distance=BoxDistance(*EVOLUTION, [*WALLS, START], twice=[START]),
            lift=lambda x: _sine(2.0, 1.0, x) + _sine(1.0, 2.0, x),
            solve=solve_sine_gordon,
            resolution=256,
            features=BoxFeatures(*EVOLUTION),
        ),
        Problem(
            "advection",
            "advection, speed 30",
            *CIRCLE,
            start=1.0,
            stop=30.0,
            residual=advection,
            distance=_time,
            lift=lambda x: torch.sin(x[..., :1]),
            solve=exact_advection,
            resolution=1,
            features=BoxFeatures(*CIRCLE, periodic=[0]),
        ),
        Problem(
            "fisher",
            "Fisher, growth 5",
            *CIRCLE,
            start=1.0,
            stop=5.0,
            residual=fisher,
            distance=_time,
            lift=_bump,
            solve=solve_fisher,
            resolution=64,
            features=BoxFeatures(*CIRCLE, periodic=[0]),
        ),
    )
}
