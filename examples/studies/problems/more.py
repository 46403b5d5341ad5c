# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Three systems beside the standard problems: a flow, a reaction with diffusion, and an equation of fourth order."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.fft import fft, ifft
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance
from peft_lotra.pde.features import BoxFeatures
from problems.standard import EVOLUTION, Problem, axes_of, since_start


# Navier-Stokes at Reynolds number 40, (u . grad) u + grad p = laplacian u / 40, div u = 0, from u and v on the
# boundary; outputs u, v, p. L. Kovasznay, "Laminar flow behind a two-dimensional grid" (1948)

REYNOLDS = 40.0
GRID = ((-0.5, -0.5), (1.0, 1.5))


def kovasznay(model: nn.Module, x: Tensor, reynolds: float) -> Tensor:
    values, (along, across), laplacian = jet(model, x, collapse=True)
    u, v = values[:, :1], values[:, 1:2]
    momentum = u * along[:, :2] + v * across[:, :2] - laplacian[:, :2] / reynolds
    pressure = torch.cat([along[:, 2:], across[:, 2:]], 1)
    return torch.cat([momentum + pressure, along[:, :1] + across[:, 1:2]], 1)


def flow(x, y, reynolds: float, lib) -> tuple:
    """Return u, v and p."""
    rate = reynolds / 2 - math.sqrt(reynolds**2 / 4 + 4 * math.pi**2)
    fall = lib.exp(rate * x)
    u = 1 - fall * lib.cos(2 * math.pi * y)
    v = rate / (2 * math.pi) * fall * lib.sin(2 * math.pi * y)
    return u, v, (1 - fall**2) / 2


def exact_kovasznay(_: int, __: float) -> np.ndarray:
    x, y = axes_of(*GRID)
    return flow(x[:, None], y, REYNOLDS, np)[0]


def boundary_flow(x: Tensor) -> Tensor:
    """u and v on the boundary, interpolated across the box (W. Gordon and C. Hall, 1973); zero for p."""
    (x_low, y_low), (x_high, y_high) = GRID
    s, t = (x[..., :1] - x_low) / (x_high - x_low), (x[..., 1:] - y_low) / (y_high - y_low)

    def at(first, second) -> Tensor:
        ends = (torch.as_tensor(end, dtype=x.dtype).expand_as(s) for end in (first, second))
        u, v, _ = flow(*ends, REYNOLDS, torch)
        return torch.cat([u, v], -1)

    sides = (1 - s) * at(x_low, x[..., 1:]) + s * at(x_high, x[..., 1:])
    sides = sides + (1 - t) * at(x[..., :1], y_low) + t * at(x[..., :1], y_high)
    low = (1 - s) * at(x_low, y_low) + s * at(x_high, y_low)
    high = (1 - s) * at(x_low, y_high) + s * at(x_high, y_high)
    return torch.cat([sides - (1 - t) * low - t * high, torch.zeros_like(s)], -1)


def at_walls(x: Tensor) -> Tensor:
    """For u and v, which are given on the boundary, and for p, which is not."""
    wall = BoxDistance(*GRID)(x)
    return torch.cat([wall, wall, torch.ones_like(wall)], -1)


# FitzHugh-Nagumo: u_t = d u_xx + 10 (u - u^3 - v), v_t = d v_xx + 5 (u - v), 2-periodic


def fitzhugh_nagumo(model: nn.Module, x: Tensor, d: float) -> Tensor:
    values, (_, rate), second = jet(model, x, collapse=(1.0, 0.0))
    u, v = values[:, :1], values[:, 1:]
    return rate - d * second - torch.cat([10 * (u - u**3 - v), 5 * (u - v)], 1)


def two_waves(x: Tensor) -> Tensor:
    angle = math.pi * x[..., :1]
    return torch.cat([torch.cos(angle), torch.sin(2 * angle) / 2], -1)


def _evolve(n: int, start: np.ndarray, rate) -> np.ndarray:
    """Fourier collocation on [-1, 1]: the first n entries of the state, at (NX, NT)."""
    x, t = axes_of(*EVOLUTION)
    found = solve_ivp(rate, (0, 1), start, "LSODA", t, rtol=1e-8, atol=1e-10).y[:n]
    wave = 1j * math.pi * np.fft.fftfreq(n, 1 / n)
    return (np.exp(np.outer(x + 1, wave)) @ fft(found, axis=0)).real / n


def _second(values: np.ndarray) -> np.ndarray:
    n = len(values)
    return -ifft((math.pi * np.fft.fftfreq(n, 1 / n)) ** 2 * fft(values)).real


def solve_fitzhugh_nagumo(n: int, d: float) -> np.ndarray:
    angle = math.pi * (-1 + 2 * np.arange(n) / n)

    def rate(_, state: np.ndarray) -> np.ndarray:
        u, v = np.split(state, 2)
        return np.r_[d * _second(u) + 10 * (u - u**3 - v), d * _second(v) + 5 * (u - v)]

    return _evolve(n, np.r_[np.cos(angle), np.sin(2 * angle) / 2], rate)


# Cahn-Hilliard: u_t = w_xx / 5, w = u^3 - u - e u_xx, 2-periodic; the equation of the second output w, of fourth order
# in u, is the second residual


def cahn_hilliard(model: nn.Module, x: Tensor, e: float) -> Tensor:
    values, (_, rate), second = jet(model, x, collapse=(1.0, 0.0))
    u, w = values[:, :1], values[:, 1:]
    return torch.cat([rate[:, :1] - second[:, 1:] / 5, (w - u**3 + u + e * second[:, :1]) / math.sqrt(e)], 1)


def mixture(x: Tensor) -> Tensor:
    angle = math.pi * x[..., :1]
    start = (torch.cos(angle) + torch.sin(2 * angle)) / 2
    return torch.cat([start, torch.zeros_like(start)], -1)


def solve_cahn_hilliard(n: int, e: float) -> np.ndarray:
    angle = math.pi * (-1 + 2 * np.arange(n) / n)

    def rate(_, u: np.ndarray) -> np.ndarray:
        return _second(u**3 - u - e * _second(u)) / 5

    return _evolve(n, (np.cos(angle) + np.sin(2 * angle)) / 2, rate)


def _new(name: str, title: str, box: tuple, start: float, stop: float, parts: tuple, resolution: int, **options):
    residual, distance, lift, solve = parts
    return Problem(name, title, *box, start, stop, residual, distance, lift, solve, resolution, **options)


WAVES = BoxFeatures(*EVOLUTION, periodic=[0])
MORE = {
    problem.name: problem
    for problem in (
        _new(
            "kovasznay",
            "Kovasznay flow, Reynolds number 40",
            GRID,
            REYNOLDS,
            REYNOLDS,
            (kovasznay, at_walls, boundary_flow, exact_kovasznay),
            1,
            features=BoxFeatures(*GRID),
            outputs=3,
        ),
        _new(
            "fitzhugh_nagumo",
            "FitzHugh-Nagumo, diffusion 0.01",
            EVOLUTION,
            0.01,
            0.01,
            (fitzhugh_nagumo, lambda x: x[..., 1:], two_waves, solve_fitzhugh_nagumo),
            128,
            features=WAVES,
            outputs=2,
        ),
        _new(
            "cahn_hilliard",
            "Cahn-Hilliard, interfaces of 0.1",
            EVOLUTION,
            0.05,
            0.01,
            (cahn_hilliard, since_start, mixture, solve_cahn_hilliard),
            96,
            features=WAVES,
            outputs=2,
        ),
    )
}
