# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Ordinary differential equations of DeepXDE's demos, with their solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor


LORENZ_START = (-8.0, 7.0, 27.0)
POPULATIONS_START = (0.5, 0.075)


def integrate(rates: Callable, times: np.ndarray, start: Sequence[float]) -> np.ndarray:
    """Return the solution (n, functions) at times (n,) that begin at zero or later."""
    end = float(times.max())
    solution = solve_ivp(rates, (0, end), start, "DOP853", rtol=1e-12, atol=1e-12, dense_output=True)
    return solution.sol(times).T


def lorenz(_: float, state: Sequence[float]) -> list[float]:
    """Return the rates of Lorenz' equations with sigma = 10, rho = 28 and beta = 8/3."""
    x, y, z = state
    return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]


def lotka_volterra(_: float, state: Sequence[float]) -> list[float]:
    """Return the rates of prey and predators, over four periods in a unit of time."""
    prey, predators = state
    return [20 * prey * (2 - 8 * predators), 20 * predators * (4 * prey - 1.06)]


def populations(x: Tensor) -> Tensor:
    """Return prey and predators at times (n, 1)."""
    return torch.from_numpy(integrate(lotka_volterra, x[:, 0].numpy(), POPULATIONS_START))
