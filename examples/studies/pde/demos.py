# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Demos of DeepXDE by `peft_lotra.pde.solve`: error, seconds, and lines of code.

Shown in docs/pde_results.md.

python examples/studies/pde/demos.py                    # 20 CPU seconds a demo, four minutes
python examples/studies/pde/demos.py --demos heat
python examples/studies/pde/demos.py --quick            # tiny, to see it run

The problems are those of the documentation of DeepXDE (L. Lu et al., SIAM Review 63 (2021)), the code is our own. The
body of each function below is all that a user writes; `solve` has its defaults. Demos like those of ten.py, shapes.py
and unknowns.py are left out.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import inspect
import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from problems.odes import populations
from scipy.integrate import solve_ivp
from study_tools.records import Record, on_cpu_clock
from study_tools.tables import table
from torch import Tensor

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, box_points, solve
from peft_lotra.pde.solution import Solution


torch.set_num_threads(1)

PI = math.pi


def ode_system(solve) -> Solution:
    def equation(model, t):
        y, (dy,), _ = jet(model, t)
        return dy - y.flip(1) * torch.tensor([1, -1])

    return solve(equation, [0], [10], distance=lambda t: t, lift=lambda t: torch.cat([0 * t, 1 + 0 * t], -1))


def lotka_volterra(solve) -> Solution:
    def equation(model, t):  # populations and times as shares of 200 and 20
        (r, p), (dr, dp) = (part.split(1, -1) for part in (jet(model, t)[0], jet(model, t)[1][0]))
        return torch.cat([dr - 20 * r * (2 - 8 * p), dp - 20 * p * (4 * r - 1.06)], 1)

    start = torch.tensor([0.5, 0.075], dtype=torch.float64)
    return solve(equation, [0], [1], distance=lambda t: t, lift=lambda t: start + 0 * t)


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


def wave(solve) -> Solution:
    def equation(model, x):
        _, _, (u_xx, u_tt) = jet(model, x)
        return (u_tt - 100 * u_xx) / 100

    walls = BoxDistance((0, 0), (1, 1), sides=[(0, "low"), (0, "high"), (1, "low")], twice=[(1, "low")])
    start = lambda x: torch.sin(PI * x[..., :1]) + torch.sin(2 * PI * x[..., :1])  # noqa: E731
    return solve(equation, (0, 0), (1, 1), distance=walls, lift=start)


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


class Demo(NamedTuple):
    """What a user writes, the exact solution at points, and the box."""

    write: Callable[..., Solution]
    exact: Callable[[Tensor], Tensor]
    low: tuple[float, ...]
    high: tuple[float, ...]


def sine(x: Tensor) -> Tensor:
    return torch.sin(PI * x[:, :1])


def two_waves(x: Tensor) -> Tensor:
    return sine(x) * torch.cos(10 * PI * x[:, 1:]) + torch.sin(2 * PI * x[:, :1]) * torch.cos(20 * PI * x[:, 1:])


def decaying_waves(x: Tensor) -> Tensor:
    return torch.exp(-x[:, 1:]) * (torch.sin(WAVES * x[:, :1]) / WAVES).sum(1, keepdim=True)


DEMOS = {
    "system of two ODEs": Demo(ode_system, lambda t: torch.cat([t.sin(), t.cos()], 1), (0,), (10,)),
    "Lotka-Volterra, four periods": Demo(lotka_volterra, populations, (0,), (1,)),
    "Poisson, Robin": Demo(poisson_robin, lambda x: (x + 1) ** 2, (-1,), (1,)),
    "Euler's beam": Demo(beam, lambda x: -(x**4) / 24 + x**3 / 6 - x**2 / 4, (0,), (1,)),
    "Laplace on a disk": Demo(laplace_disk, lambda x: x[:, :1] * torch.cos(x[:, 1:]), (0, 0), (1, 2 * PI)),
    "heat": Demo(heat, lambda x: sine(x) * torch.exp(-0.4 * PI**2 * x[:, 1:]), (0, 0), (1, 1)),
    "diffusion and reaction": Demo(diffusion_reaction, decaying_waves, (-PI, 0), (PI, 1)),
    "Klein-Gordon": Demo(klein_gordon, lambda x: x[:, :1] * torch.cos(x[:, 1:]), (-1, 0), (1, 10)),
    "Schroedinger": Demo(schroedinger, schroedinger_exact, (-5, 0), (5, PI / 2)),
    "wave, speed 10": Demo(wave, two_waves, (0, 0), (1, 1)),
    "unknown field": Demo(unknown_field, lambda x: torch.cat([sine(x), -(PI**2) * sine(x)], 1), (-1,), (1,)),
}


def error_of(demo: Demo, solution: Solution) -> float:
    """Return the relative L2 error."""
    x = box_points(demo.low, demo.high, 4000, seed=7)
    expected = demo.exact(x)
    return ((solution.model(x).detach() - expected).norm() / expected.norm()).item()


def lines_of(write: Callable) -> int:
    """The lines of code in the body of a function."""
    lines = [line.strip() for line in inspect.getsource(write).splitlines()[1:]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def run(name: str, seed: int, seconds: float) -> dict:
    """Solve a demo, and return its record."""
    demo = DEMOS[name]
    call = partial(solve, seconds=seconds, seed=seed, progress=False)
    solution, report = on_cpu_clock(lambda: demo.write(call))
    return {
        "seed": seed,
        "error": error_of(demo, solution),
        "seconds": report["seconds"],
        "steps": report["steps"],
        "notes": solution.notes,
    }


def markdown(record: dict) -> str:
    """The table of the page."""
    lines = []
    for name, runs in record["results"].items():
        error, seconds = (statistics.median(run[key] for run in runs) for key in ("error", "seconds"))
        lines.append([name, lines_of(DEMOS[name].write), f"{error:.1e}", f"{seconds:.0f}"])
    return table("| demo | lines | error | CPU s |", lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="four minutes on one core",
        writes="demos.json, demos.md",
        folder=command_line.RESULTS / "pde",
        quick="one demo, a second: to see it run",
    )
    parser.add_choices("--demos", DEMOS)
    parser.add_seeds(0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    args = parser.parse_args()
    seconds = 1.0 if args.quick else args.seconds
    demos = args.demos[2:3] if args.quick else args.demos
    record = Record.of(args, "demos", {"seconds": seconds})
    record.complete(product(args.seeds, demos), lambda seed, name: run(name, seed, seconds))
    record.write_page(markdown)


if __name__ == "__main__":
    main()
