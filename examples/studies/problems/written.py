# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Problems as a user writes them for `solve`, with exact solutions: the demos of DeepXDE, and others that are hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, box_points
from peft_lotra.pde.solution import Solution
from problems.odes import POPULATIONS_START, integrate, populations


PI = math.pi
FLOW = "walls and start"


class Written(NamedTuple):
    """What a user writes, the exact solution at points, and the box.

    Attributes:
        must: The error that issue 62 asks for; NaN for none.
        seconds: Of a run.
    """

    write: Callable[..., Solution]
    exact: Callable[[Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]
    must: float = math.nan
    seconds: float = 60.0

    def error(self, solution: Solution) -> float:
        """Return the relative L2 error."""
        count = 4000 if len(self.low) > 1 else 2000
        x = box_points(self.low, self.high, count, seed=7)
        expected = self.exact(x)
        return ((solution.model(x).detach() - expected).norm() / expected.norm()).item()


def since_start(x: Tensor) -> Tensor:
    """The time, as a distance."""
    return x[..., -1:]


def sine(x: Tensor) -> Tensor:
    return torch.sin(PI * x[..., :1])


def strip(high: tuple[float, float], twice: bool = False) -> BoxDistance:
    """Return the distance from both walls and the start of a box from (0, 0)."""
    sides = [(0, "low"), (0, "high"), (1, "low")]
    return BoxDistance((0, 0), high, sides=sides, twice=sides[2:] if twice else ())


def by_fourier(
    rates: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    low: float,
    width: float,
    x: Tensor,
    steps: int,
    is_real: bool = True,
    nonlinear: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Tensor:
    """Solve u_t = L u + N(u) on a periodic line by an integrating factor and Runge-Kutta, at points (n, 2).

    Args:
        rates: The symbol of L, of the wave numbers.
        start: u at equidistant places from `low` on.
        x: Points (place, time).
        steps: Of the time up to the latest point.
        nonlinear: The spectrum of N, from u and the wave numbers.
    """
    count = len(start)
    k = 2 * PI * np.fft.fftfreq(count, width / count)
    times, which = torch.unique(x[:, 1], return_inverse=True)
    times = times.numpy()
    step = times[-1] / steps
    linear = rates(k)
    half = np.exp(linear * step / 2)

    def right(v: np.ndarray) -> np.ndarray:
        if nonlinear is None:
            return np.zeros_like(v)
        u = np.fft.ifft(v)
        return nonlinear(u.real if is_real else u, k)

    def advance(v: np.ndarray, h: float, half: np.ndarray) -> np.ndarray:
        a = h * right(v)
        b = h * right(half * (v + a / 2))
        c = h * right(half * v + b / 2)
        d = h * right(half**2 * v + half * c)
        return half**2 * v + (half**2 * a + 2 * half * (b + c) + d) / 6

    phases = np.exp(1j * np.outer(x[:, 0].numpy() - low, k)) / count
    values = np.empty(len(x), dtype=complex)
    spectrum = np.fft.fft(start.astype(complex))
    number = 0
    for index, instant in enumerate(times):
        while (number + 1) * step <= instant + 1e-12:
            spectrum = advance(spectrum, step, half)
            number += 1
        rest = instant - number * step
        there = advance(spectrum, rest, np.exp(linear * rest / 2))
        rows = (which == index).numpy()
        values[rows] = phases[rows] @ there
    result = torch.tensor(values)
    return result.real.unsqueeze(1) if is_real else torch.stack([result.real, result.imag], 1)


# Ordinary differential equations


def logistic(solve) -> Solution:
    def equation(model, x):
        u, (rate,) = jet(model, x, order=1)
        return rate - 5 * u * (1 - u)

    return solve(equation, [0], [4], distance=since_start, lift=1e-3)


def exact_logistic(x: Tensor) -> Tensor:
    growth = 1e-3 * torch.exp(5 * x)
    return growth / (1 - 1e-3 + growth)


def second_order(rate: Callable, start: tuple[float, float], high: float) -> Callable[..., Solution]:
    """Return a problem u'' = rate(u, u', t), written with `solve`."""

    def write(solve) -> Solution:
        def equation(model, x):
            u, (slope,), (second,) = jet(model, x)
            return second - rate(u, slope, torch)

        lift = lambda x: start[0] + start[1] * x  # noqa: E731
        return solve(equation, [0], [high], distance=lambda x: x**2, lift=lift)

    return write


def exact_second_order(rate: Callable, start: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    def exact(x: Tensor) -> Tensor:
        rates = lambda _, y: [y[1], rate(*y, np)]  # noqa: E731
        times, order = x[:, 0].sort()
        values = torch.empty_like(x)
        values[order, 0] = torch.from_numpy(integrate(rates, times.numpy(), start)[:, 0])
        return values

    return exact


def van_der_pol(u, slope, _):
    return 10 * (1 - u**2) * slope - u


def pendulum(u, _, lib):
    return -lib.sin(u)


def ringing(u, slope, _):
    return -100 * u - 0.4 * slope


def ode_system(solve) -> Solution:
    def equation(model, x):
        u, (rate,) = jet(model, x, order=1)
        return rate - torch.stack([u[:, 1], -u[:, 0]], 1)

    start = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return solve(equation, [0], [10], distance=lambda t: t, lift=lambda t: start + 0 * t)


def lotka_volterra(solve) -> Solution:
    def equation(model, x):
        u, (rate,) = jet(model, x, order=1)
        prey, predators = u[:, :1], u[:, 1:]
        return rate - 20 * torch.cat([prey * (2 - 8 * predators), predators * (4 * prey - 1.06)], 1)

    start = torch.tensor(POPULATIONS_START, dtype=torch.float64)
    return solve(equation, [0], [1], distance=lambda t: t, lift=lambda t: start + 0 * t)


def delay(solve) -> Solution:  # u'(t) = -u(t - 1), u = 1 before 0
    def equation(model, x):
        _, (rate,) = jet(model, x, order=1)
        before = torch.where(x > 1, model((x - 1).clamp(min=0.0)), 1.0)
        return rate + before

    return solve(equation, [0], [4], distance=since_start, lift=1.0)


def exact_delay(x: Tensor) -> Tensor:
    """By the method of steps: sum_n (-1)^n max(t - n + 1, 0)^n / n!."""
    total = torch.zeros_like(x)
    for n in range(7):
        total += (-1) ** n * (x - n + 1).clamp(min=0.0) ** n / math.factorial(n) * (x >= n - 1)
    return total


def volterra(solve) -> Solution:  # u'(t) = -int_0^t u(s) ds, u(0) = 1
    nodes, weights = np.polynomial.legendre.leggauss(20)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights)

    def equation(model, x):
        _, (rate,) = jet(model, x, order=1)
        s = x * (1 + nodes) / 2  # (n, 20)
        values = model(s.reshape(-1, 1)).view_as(s)
        return rate + x / 2 * (values * weights).sum(1, keepdim=True)

    return solve(equation, [0], [5], distance=since_start, lift=1.0)


def poisson_robin(solve) -> Solution:  # u'(1) = u(1)
    def equation(model, x):
        return jet(model, x)[2][0] - 2

    def robin(model, x):
        u, du, _ = jet(model, x)
        return du[0] - u

    end = torch.ones(1, 1).double()
    return solve(equation, [-1], [1], distance=lambda x: x + 1, terms=[(robin, end, 100.0)])


def beam(solve) -> Solution:
    def equation(model, x):
        return jet(model, x, order=4)[4][0] + 1

    def free_end(model, x):
        _, _, (moment,), (force,) = jet(model, x, order=3)
        return torch.cat([moment, force], 1)

    end = torch.ones(1, 1).double()
    return solve(equation, [0], [1], distance=lambda x: x**2, terms=[(free_end, end, 100.0)])


def fast_poisson(solve) -> Solution:
    def equation(model, x):
        return jet(model, x)[2][0] + (50 * PI) ** 2 * torch.sin(50 * PI * x)

    return solve(equation, [0], [1], distance=BoxDistance([0], [1]))


def boundary_layer(width: float) -> Callable[..., Solution]:
    """Return width u'' + u' = -1, with a layer at 0."""

    def write(solve) -> Solution:
        def equation(model, x):
            _, (slope,), (second,) = jet(model, x)
            return width * second + slope + 1

        return solve(equation, [0], [1], distance=BoxDistance([0], [1]))

    return write


def exact_layer(width: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (1 - torch.exp(-x / width)) / (1 - math.exp(-1 / width)) - x


# Waves, and what moves


def convection(solve) -> Solution:
    def equation(model, x):
        _, (u_x, u_t) = jet(model, x, order=1)
        return u_t + 50 * u_x

    start = lambda x: torch.sin(x[..., :1])  # noqa: E731
    return solve(equation, (0, 0), (2 * PI, 1), periodic=[0], distance=since_start, lift=start)


def reaction(solve) -> Solution:
    def equation(model, x):
        u, (_, u_t) = jet(model, x, order=1)
        return u_t - 5 * u * (1 - u)

    return solve(equation, (0, 0), (2 * PI, 1), distance=since_start, lift=hill)


def hill(x: Tensor) -> Tensor:
    return torch.exp(-((x[..., :1] - PI) ** 2) / (2 * (PI / 4) ** 2))


def exact_reaction(x: Tensor) -> Tensor:
    growth = hill(x) * torch.exp(5 * x[:, 1:])
    return growth / (growth + 1 - hill(x))


def waves(speed: float, second: float, factor: float) -> tuple[Callable, Callable]:
    """Return u_tt = speed^2 u_xx from two standing waves, written with `solve`, and its solution."""

    def write(solve) -> Solution:
        def equation(model, x):
            _, _, (u_xx, u_tt) = jet(model, x)
            return u_tt / speed**2 - u_xx

        start = lambda x: sine(x) + factor * torch.sin(second * PI * x[..., :1])  # noqa: E731
        return solve(equation, (0, 0), (1, 1), distance=strip((1, 1), twice=True), lift=start)

    def exact(x: Tensor) -> Tensor:
        s, t = x[:, :1], x[:, 1:]
        other = torch.sin(second * PI * s) * torch.cos(second * speed * PI * t)
        return torch.sin(PI * s) * torch.cos(speed * PI * t) + factor * other

    return write, exact


def solitons(x: Tensor) -> Tensor:
    """Return the solution of u_t + 6 u u_x + u_xxx = 0 with two solitons, of speeds 4 and 1."""

    def hyperbolic(k, place):
        angle = k * (x[..., :1] - k**2 * x[..., 1:] - place)
        return torch.exp(angle)

    k, m = 2.0, 1.0
    a, b = hyperbolic(k, -6.0), hyperbolic(m, -2.0)
    shift = ((k - m) / (k + m)) ** 2
    tau = 1 + a + b + shift * a * b
    slope = k * a + m * b + shift * (k + m) * a * b
    second = k**2 * a + m**2 * b + shift * (k + m) ** 2 * a * b
    return 2 * (second * tau - slope**2) / tau**2


def two_solitons(solve) -> Solution:
    def equation(model, x):
        u, (u_x, u_t), _, u_xxx = jet(model, x, order=3, collapse=(1.0, 0.0))
        return u_t + 6 * u * u_x + u_xxx

    def start(x):
        return solitons(torch.cat([x[..., :1], 0 * x[..., 1:]], -1))

    return solve(equation, (-16, 0), (16, 3), periodic=[0], distance=since_start, lift=start)


def trap(solve) -> Solution:  # i h_t = -h_xx / 2 + x^2 h / 2
    def equation(model, x):
        h, (_, h_t), h_xx = jet(model, x, collapse=(1.0, 0.0))
        turned = torch.cat([-h_t[:, 1:], h_t[:, :1]], 1)
        return turned + 0.5 * h_xx - 0.5 * x[:, :1] ** 2 * h

    def start(x):
        packet = PI**-0.25 * torch.exp(-((x[..., :1] - 2) ** 2) / 2)
        return torch.cat([packet, 0 * packet], -1)

    walls = BoxDistance((-8, 0), (8, 6), sides=[(0, "low"), (0, "high"), (1, "low")])
    return solve(equation, (-8, 0), (8, 6), distance=walls, lift=start)


def exact_trap(x: Tensor) -> Tensor:
    s, t = x[:, 0], x[:, 1]
    size = PI**-0.25 * torch.exp(-((s - 2 * torch.cos(t)) ** 2) / 2)
    angle = -(t / 2 + 2 * s * torch.sin(t) - torch.sin(2 * t))
    return torch.stack([size * torch.cos(angle), size * torch.sin(angle)], 1)


def carried(x: Tensor) -> Tensor:
    """Return a hill that is carried with speed 1 and spreads by diffusion 1e-3, on a line of length 2."""
    s, t = x[..., :1], x[..., 1:]
    width = 0.01 + 4e-3 * t
    return sum(torch.sqrt(0.01 / width) * torch.exp(-((s - 0.5 - t + n) ** 2) / width) for n in (-2, 0, 2))


def advection_diffusion(solve) -> Solution:
    def equation(model, x):
        _, (u_x, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t + u_x - 1e-3 * u_xx

    def start(x):
        return carried(torch.cat([x[..., :1], 0 * x[..., 1:]], -1))

    return solve(equation, (0, 0), (2, 1), periodic=[0], distance=since_start, lift=start)


def steady_advection(solve) -> Solution:  # u_x = u_xx / 1000, with a layer of 1e-3
    def equation(model, x):
        _, (slope,), (second,) = jet(model, x)
        return slope - 1e-3 * second

    return solve(equation, [0], [1], distance=BoxDistance([0], [1]), lift=lambda x: x)


def exact_steady(x: Tensor) -> Tensor:
    return (torch.exp(1000 * (x - 1)) - math.exp(-1000)) / (1 - math.exp(-1000))


def allen_cahn(solve) -> Solution:
    def equation(model, x):
        u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - 1e-4 * u_xx + 5 * u**3 - 5 * u

    start = lambda x: x[..., :1] ** 2 * torch.cos(PI * x[..., :1])  # noqa: E731
    return solve(equation, (-1, 0), (1, 1), periodic=[0], distance=since_start, lift=start)


def exact_allen_cahn(x: Tensor) -> Tensor:
    count = 1024
    s = -1 + 2 * np.arange(count) / count
    nonlinear = lambda u, k: np.fft.fft(5 * u - 5 * u**3)  # noqa: E731
    return by_fourier(lambda k: -1e-4 * k**2, s**2 * np.cos(PI * s), -1, 2, x, 2000, nonlinear=nonlinear)


def korteweg_de_vries(solve) -> Solution:
    def equation(model, x):
        u, (u_x, u_t), _, u_xxx = jet(model, x, order=3, collapse=(1.0, 0.0))
        return u_t + u * u_x + 0.022**2 * u_xxx

    start = lambda x: torch.cos(PI * x[..., :1])  # noqa: E731
    return solve(equation, (-1, 0), (1, 1), periodic=[0], distance=since_start, lift=start)


def exact_korteweg_de_vries(x: Tensor) -> Tensor:
    count = 512
    s = -1 + 2 * np.arange(count) / count
    nonlinear = lambda u, k: -0.5j * k * np.fft.fft(u**2)  # noqa: E731
    return by_fourier(lambda k: 0.022**2 * 1j * k**3, np.cos(PI * s), -1, 2, x, 20000, nonlinear=nonlinear)


def jump_of_heat(solve) -> Solution:  # 1 in the middle half, 0 outside, and no heat at the walls
    def equation(model, x):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - 0.05 * u_xx

    points = torch.stack([torch.linspace(0, 1, 400).double(), torch.zeros(400).double()], 1)
    values = ((points[:, :1] > 0.25) & (points[:, :1] < 0.75)).double()
    start = (lambda model, x, u: model(x) - u, (points, values), 100.0)
    walls = BoxDistance((0, 0), (1, 1), sides=[(0, "low"), (0, "high")])
    return solve(equation, (0, 0), (1, 1), distance=walls, terms=[start])


def exact_jump(x: Tensor) -> Tensor:
    n = torch.arange(1, 2000, dtype=torch.float64)
    sizes = 2 * (torch.cos(n * PI / 4) - torch.cos(3 * n * PI / 4)) / (n * PI)
    modes = torch.sin(n * PI * x[:, :1]) * torch.exp(-0.05 * (n * PI) ** 2 * x[:, 1:])
    return (modes * sizes).sum(1, keepdim=True)


# In two dimensions


def layer(solve) -> Solution:  # u = tanh((x + y - 1) / 0.02)
    def equation(model, x):
        _, _, laplacian = jet(model, x, collapse=True)
        return (laplacian - source(x)) / 1000

    def source(x):
        value = exact_diagonal(x)
        return 2 * -2 * value * (1 - value**2) / 0.02**2

    return solve(equation, (0, 0), (1, 1), distance=BoxDistance((0, 0), (1, 1)), lift=at_walls)


def exact_diagonal(x: Tensor) -> Tensor:
    return torch.tanh((x[..., :1] + x[..., 1:] - 1) / 0.02)


def at_walls(x: Tensor) -> Tensor:
    """Blend the values of the diagonal layer at the sides of the square."""
    s, t = x[..., :1], x[..., 1:]
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    at = lambda a, b: exact_diagonal(torch.cat([a, b], -1))  # noqa: E731
    sides = (1 - s) * at(zero, t) + s * at(one, t) + (1 - t) * at(s, zero) + t * at(s, one)
    corners = (1 - s) * (1 - t) * at(zero, zero) + s * t * at(one, one)
    return sides - corners - (1 - s) * t * at(zero, one) - s * (1 - t) * at(one, zero)


def burgers(solve) -> Solution:
    def equation(model, x):
        u, (u_x, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t + u * u_x - 0.05 * u_xx

    walls = BoxDistance((-1, 0), (1, 1), sides=[(0, "low"), (0, "high"), (1, "low")])
    return solve(equation, (-1, 0), (1, 1), distance=walls, lift=lambda x: -sine(x))


def exact_burgers(x: Tensor) -> Tensor:
    count = 512
    s = -1 + 2 * np.arange(count) / count
    nonlinear = lambda u, k: -0.5j * k * np.fft.fft(u**2)  # noqa: E731
    return by_fourier(lambda k: -0.05 * k**2, -np.sin(PI * s), -1, 2, x, 4000, nonlinear=nonlinear)


def poisson(solve) -> Solution:
    def equation(model, x):
        return jet(model, x, collapse=True)[2] + 2 * PI**2 * torch.sin(PI * x).prod(1, keepdim=True)

    return solve(equation, (0, 0), (1, 1), distance=BoxDistance((0, 0), (1, 1)))


def biharmonic(solve) -> Solution:
    def equation(model, x):
        directions = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]]).double()
        # u_xxyy is a twelfth of the sum of the diagonals' fourth derivatives less those of the axes
        weights = (2 / 3, 2 / 3, 1 / 6, 1 / 6)
        fourth = jet(model, x, directions, order=4, collapse=weights)[4]
        return fourth / 100 - 4 * PI**4 / 100 * torch.sin(PI * x).prod(1, keepdim=True)

    def bending(model, x):  # of simply supported sides
        return jet(model, x, collapse=True)[2]

    sides = box_points((0, 0), (1, 1), 400, seed=3)
    sides[::2, 0] = sides[::2, 0].round()
    sides[1::2, 1] = sides[1::2, 1].round()
    terms = [(bending, sides, 1.0)]
    return solve(equation, (0, 0), (1, 1), distance=BoxDistance((0, 0), (1, 1)), terms=terms)


def laplace_disk(solve) -> Solution:  # in polar coordinates
    def equation(model, x):
        (r, _), (_, (u_r, _), (u_rr, u_aa)) = x.split(1, 1), jet(model, x)
        return r * u_r + r**2 * u_rr + u_aa

    return solve(equation, (0, 0), (1, 2 * PI), periodic=[1], distance=lambda x: 1 - x[..., :1],
                 lift=lambda x: torch.cos(x[..., 1:]))  # fmt: skip


def heat(solve) -> Solution:
    def equation(model, x):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - 0.4 * u_xx

    walls_and_start = BoxDistance((0, 0), (1, 1), sides=[(0, "low"), (0, "high"), (1, "low")])
    return solve(equation, (0, 0), (1, 1), distance=walls_and_start, lift=lambda x: torch.sin(PI * x[..., :1]))


WAVES = torch.tensor([1.0, 2, 3, 4, 8], dtype=torch.float64)


def diffusion_reaction(solve) -> Solution:
    def equation(model, x):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        source = ((WAVES**2 - 1) / WAVES * torch.sin(WAVES * x[:, :1])).sum(1, keepdim=True)
        return u_t - u_xx - torch.exp(-x[:, 1:]) * source

    def start(x):
        return (torch.sin(WAVES * x[..., :1]) / WAVES).sum(-1, keepdim=True)

    return solve(equation, (-PI, 0), (PI, 1), periodic=[0], distance=lambda x: x[..., 1:], lift=start)


def klein_gordon(solve) -> Solution:
    def equation(model, x):
        u, _, (u_xx, u_tt) = jet(model, x)
        wave = x[:, :1] * torch.cos(x[:, 1:])
        return u_tt - u_xx + u**2 + wave - wave**2

    def lift(x):
        return x[..., :1] + x[..., :1] ** 3 * (torch.cos(x[..., 1:]) - 1)

    walls = BoxDistance((-1, 0), (1, 10), sides=[(0, "low"), (0, "high"), (1, "low")], twice=[(1, "low")])
    return solve(equation, (-1, 0), (1, 10), distance=walls, lift=lift)


def schroedinger(solve) -> Solution:
    def equation(model, x):
        h, (_, h_t), h_xx = jet(model, x, collapse=(1.0, 0.0))
        turned = torch.cat([-h_t[:, 1:], h_t[:, :1]], 1)  # i h_t
        return turned + 0.5 * h_xx + h.square().sum(1, keepdim=True) * h

    def start(x):
        return torch.cat([periodic_sech(x[..., :1]), 0 * x[..., :1]], -1)

    return solve(equation, (-5, 0), (5, PI / 2), periodic=[0], distance=lambda x: x[..., 1:], lift=start)


def unknown_field(solve) -> Solution:  # u'' = q, with data of u: the outputs are u and q
    def equation(model, x):
        values, _, (second,) = jet(model, x)
        return second[:, :1] - values[:, 1:]

    x = torch.linspace(-1, 1, 100).double()[:, None]
    data = (lambda model, x, u: model(x)[:, :1] - u, (x, torch.sin(PI * x)), 100.0)
    ends = lambda x: torch.cat([1 - x**2, 1 + 0 * x], -1)  # noqa: E731
    return solve(equation, [-1], [1], distance=ends, terms=[data])


def periodic_sech(x: Tensor) -> Tensor:
    """2 sech(x) and its images at a distance of 10."""
    return sum(2 / torch.cosh(x + shift) for shift in (-20, -10, 0, 10, 20))


def schroedinger_exact(x: Tensor) -> Tensor:
    """By Fourier collocation and DOP853."""
    count = 512
    points = -5 + 10 * np.arange(count) / count
    rates = -((2 * PI * np.fft.fftfreq(count, 10 / count)) ** 2)

    def right(t, h):
        return 1j * (0.5 * np.fft.ifft(rates * np.fft.fft(h)) + np.abs(h) ** 2 * h)

    times, place = torch.unique(x[:, 1], return_inverse=True)
    start = periodic_sech(torch.tensor(points)).numpy().astype(complex)
    found = solve_ivp(right, (0, PI / 2), start, "DOP853", rtol=1e-10, atol=1e-11, t_eval=times.numpy())
    spectrum = np.fft.fft(found.y, axis=0).T[place.numpy()] / count
    phases = np.exp(1j * 2 * PI * np.fft.fftfreq(count, 1 / count) * (x[:, :1].numpy() + 5) / 10)
    h = torch.tensor((spectrum * phases).sum(1))
    return torch.stack([h.real, h.imag], 1)


def decaying_waves(x: Tensor) -> Tensor:
    return torch.exp(-x[:, 1:]) * (torch.sin(WAVES * x[:, :1]) / WAVES).sum(1, keepdim=True)


UNIT = (0.0, 0.0), (1.0, 1.0)
WAVE, EXACT_WAVE = waves(2.0, 3.0, 0.5)
FAST_WAVE, EXACT_FAST_WAVE = waves(10.0, 2.0, 1.0)

MUST = {
    "convection, speed 50": Written(
        convection, lambda x: torch.sin(x[:, :1] - 50 * x[:, 1:]), (0, 0), (2 * PI, 1), 5e-3
    ),
    "reaction": Written(reaction, exact_reaction, (0, 0), (2 * PI, 1), 5e-4),
    "wave, u_tt = 4 u_xx": Written(WAVE, EXACT_WAVE, *UNIT, 1e-4),
    "Van der Pol, mu = 10": Written(
        second_order(van_der_pol, (2.0, 0.0), 20), exact_second_order(van_der_pol, (2.0, 0.0)), (0,), (20,), 1e-2
    ),
    "pendulum, ten periods": Written(
        second_order(pendulum, (2.5, 0.0), 110), exact_second_order(pendulum, (2.5, 0.0)), (0,), (110,), 1e-2
    ),
    "logistic growth": Written(logistic, exact_logistic, (0,), (4,), 1e-4),
    "two solitons": Written(two_solitons, solitons, (-16, 0), (16, 3), 1e-2),
    "Schroedinger, trap": Written(trap, exact_trap, (-8, 0), (8, 6), 1e-2),
    "advection-diffusion, Pe 1000": Written(advection_diffusion, carried, (0, 0), (2, 1), 1.3e-4),
    "heat from a jump": Written(jump_of_heat, exact_jump, *UNIT, 2e-2),
    "Allen-Cahn, 1e-4": Written(allen_cahn, exact_allen_cahn, (-1, 0), (1, 1), 2e-5, 120.0),
    "KdV, 0.022^2": Written(korteweg_de_vries, exact_korteweg_de_vries, (-1, 0), (1, 1), 4e-4, 120.0),
}

MORE = {
    "system of two ODEs": Written(ode_system, lambda t: torch.cat([t.sin(), t.cos()], 1), (0,), (10,)),
    "Lotka-Volterra, four periods": Written(lotka_volterra, populations, (0,), (1,)),
    "damped oscillation": Written(
        second_order(ringing, (1.0, 0.0), 10), exact_second_order(ringing, (1.0, 0.0)), (0,), (10,)
    ),
    "delay": Written(delay, exact_delay, (0,), (4,)),
    "integral over the past": Written(volterra, torch.cos, (0,), (5,)),
    "Poisson, Robin": Written(poisson_robin, lambda x: (x + 1) ** 2, (-1,), (1,)),
    "Euler's beam": Written(beam, lambda x: -(x**4) / 24 + x**3 / 6 - x**2 / 4, (0,), (1,)),
    "u'' = f, u = sin(50 pi x)": Written(fast_poisson, lambda x: torch.sin(50 * PI * x), (0,), (1,)),
    "boundary layer of 0.01": Written(boundary_layer(1e-2), exact_layer(1e-2), (0,), (1,)),
    "boundary layer of 0.001": Written(boundary_layer(1e-3), exact_layer(1e-3), (0,), (1,)),
    "steady advection, Pe 1000": Written(steady_advection, exact_steady, (0,), (1,)),
    "layer of 0.02 in a square": Written(layer, exact_diagonal, *UNIT),
    "Burgers, 0.05": Written(burgers, exact_burgers, (-1, 0), (1, 1)),
    "Poisson": Written(poisson, lambda x: torch.sin(PI * x).prod(1, keepdim=True), *UNIT),
    "biharmonic": Written(biharmonic, lambda x: torch.sin(PI * x).prod(1, keepdim=True), *UNIT),
    "Laplace on a disk": Written(laplace_disk, lambda x: x[:, :1] * torch.cos(x[:, 1:]), (0, 0), (1, 2 * PI)),
    "heat": Written(heat, lambda x: sine(x) * torch.exp(-0.4 * PI**2 * x[:, 1:]), *UNIT),
    "diffusion and reaction": Written(diffusion_reaction, decaying_waves, (-PI, 0), (PI, 1)),
    "Klein-Gordon": Written(klein_gordon, lambda x: x[:, :1] * torch.cos(x[:, 1:]), (-1, 0), (1, 10)),
    "Schroedinger, cubic": Written(schroedinger, schroedinger_exact, (-5, 0), (5, PI / 2)),
    "wave, speed 10": Written(FAST_WAVE, EXACT_FAST_WAVE, *UNIT),
    "unknown field": Written(unknown_field, lambda x: torch.cat([sine(x), -(PI**2) * sine(x)], 1), (-1,), (1,)),
}

WRITTEN = MUST | MORE
