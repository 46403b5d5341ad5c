# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Demos of DeepXDE by `peft_lotra.pde.solve`: error, seconds, and lines of code; five of them by DeepXDE, too.

Shown in docs/pde_results.md.

python examples/studies/pde/demos.py                    # 20 CPU seconds a demo, eight minutes
python examples/studies/pde/demos.py --demos beam heat
python examples/studies/pde/demos.py --peers            # five demos by DeepXDE, as many CPU seconds
python examples/studies/pde/demos.py --quick            # tiny, to see it run

The problems are those of the documentation of DeepXDE (L. Lu et al., SIAM Review 63 (2021)), the code is our own. The
body of each function below is all that a user writes; `solve` has its defaults. DeepXDE has the networks and the
optimizers of its own demos (Adam, then L-BFGS), and stops when the CPU seconds are used up; imports do not count.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev
from problems.more import flow
from problems.odes import LORENZ_START, integrate, lorenz, populations
from problems.standard import cole_hopf
from scipy.integrate import solve_ivp
from shapes import l_shape_reference
from study_tools.records import Record, on_cpu_clock
from study_tools.tables import table
from torch import Tensor

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, box_points, disk, polygon, robin, side_points, solve
from peft_lotra.pde.solution import Solution


torch.set_num_threads(1)

PI = math.pi


def ode_system(solve) -> Solution:
    def equation(model, t):
        y, (dy,), _ = jet(model, t)
        return dy - y.flip(1) * torch.tensor([1, -1])

    return solve(equation, [0], [10], distance=lambda t: t, lift=lambda t: torch.cat([0 * t, 1 + 0 * t], -1))


def second_order(solve) -> Solution:
    def equation(model, t):
        y, (dy,), (d2y,) = jet(model, t)
        return d2y - 10 * dy + 9 * y - 5 * t

    return solve(equation, [0], [0.25], distance=lambda t: t**2, lift=lambda t: 2 * t - 1)


def lotka_volterra(solve) -> Solution:
    def equation(model, t):  # populations and times as shares of 200 and 20
        (r, p), (dr, dp) = (part.split(1, -1) for part in (jet(model, t)[0], jet(model, t)[1][0]))
        return torch.cat([dr - 20 * r * (2 - 8 * p), dp - 20 * p * (4 * r - 1.06)], 1)

    start = torch.tensor([0.5, 0.075], dtype=torch.float64)
    return solve(equation, [0], [1], distance=lambda t: t, lift=lambda t: start + 0 * t)


def poisson(solve) -> Solution:
    def equation(model, x):
        return jet(model, x)[2][0] + PI**2 * torch.sin(PI * x)

    return solve(equation, [-1], [1], distance=BoxDistance([-1], [1]))


def poisson_neumann(solve) -> Solution:  # u'(1) = 4
    def equation(model, x):
        return jet(model, x)[2][0] - 2

    end, normal = torch.ones(1, 1).double(), torch.ones(1, 1).double()
    return solve(equation, [-1], [1], distance=lambda x: x + 1, terms=[robin(end, normal, 0.0, 1.0, 4.0)])


def poisson_robin(solve) -> Solution:  # u'(1) = u(1)
    def equation(model, x):
        return jet(model, x)[2][0] - 2

    def robin(model, x):
        u, du, _ = jet(model, x)
        return du[0] - u

    end = torch.ones(1, 1).double()
    return solve(equation, [-1], [1], distance=lambda x: x + 1, terms=[(robin, end, 100.0)])


def l_shape(solve) -> Solution:  # with the singular function of the corner
    shape = polygon([(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (-1, 1)])

    def equation(model, x):
        return shape.distance(x) * (jet(model, x, collapse=True)[2] + 1)

    def corner(x):
        right, up = x[..., :1], x[..., 1:]
        angle = torch.atan2(-right - up, up - right) + 3 * PI / 4
        others = (1 - right**2) * (1 - up**2)
        return (right**2 + up**2) ** (1 / 3) * torch.sin(2 / 3 * angle) * others

    class Lift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.coefficient = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.coefficient * corner(x)

    return solve(equation, (-1, -1), (1, 1), inside=shape.inside, distance=shape.distance, lift=Lift())


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


def helmholtz(solve) -> Solution:
    def equation(model, x):
        u, _, laplacian = jet(model, x, collapse=True)
        return laplacian + (4 * PI) ** 2 * (u + torch.sin(4 * PI * x).prod(1, keepdim=True))

    return solve(equation, (0, 0), (1, 1), distance=BoxDistance((0, 0), (1, 1)))


def helmholtz_hole(solve) -> Solution:
    def equation(model, x):
        u, _, laplacian = jet(model, x, collapse=True)
        return laplacian + (2 * PI) ** 2 * (u + torch.sin(2 * PI * x).prod(1, keepdim=True))

    def slopes(x):
        s, c = torch.sin(2 * PI * x), torch.cos(2 * PI * x)
        return 2 * PI * (normals * c * s.flip(1)).sum(1)

    hole = disk((0, 0), 0.25)
    points, outward = hole.boundary(200)
    normals = -outward
    box = (-0.5, -0.5), (0.5, 0.5)
    return solve(equation, *box, distance=BoxDistance(*box), inside=lambda x: ~hole.inside(x),
                 terms=[robin(points, normals, 0.0, 1.0, slopes)])  # fmt: skip


def heat(solve) -> Solution:
    def equation(model, x):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - 0.4 * u_xx

    walls_and_start = BoxDistance((0, 0), (1, 1), sides=[(0, "low"), (0, "high"), (1, "low")])
    return solve(equation, (0, 0), (1, 1), distance=walls_and_start, lift=lambda x: torch.sin(PI * x[..., :1]))


def diffusion(solve) -> Solution:
    def equation(model, x):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - u_xx + torch.exp(-x[:, 1:]) * (1 - PI**2) * torch.sin(PI * x[:, :1])

    walls_and_start = BoxDistance((-1, 0), (1, 1), sides=[(0, "low"), (0, "high"), (1, "low")])
    return solve(equation, (-1, 0), (1, 1), distance=walls_and_start, lift=lambda x: torch.sin(PI * x[..., :1]))


WAVES = torch.tensor([1.0, 2, 3, 4, 8], dtype=torch.float64)


def diffusion_reaction(solve) -> Solution:
    def equation(model, x):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        source = ((WAVES**2 - 1) / WAVES * torch.sin(WAVES * x[:, :1])).sum(1, keepdim=True)
        return u_t - u_xx - torch.exp(-x[:, 1:]) * source

    def start(x):
        return (torch.sin(WAVES * x[..., :1]) / WAVES).sum(-1, keepdim=True)

    return solve(equation, (-PI, 0), (PI, 1), periodic=[0], distance=lambda x: x[..., 1:], lift=start)


def burgers(solve) -> Solution:
    def equation(model, x, viscosity):
        u, (u_x, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t + u * u_x - viscosity * u_xx

    box = (-1, 0), (1, 1)
    return solve(equation, *box, distance=BoxDistance(*box, sides=[(0, "low"), (0, "high"), (1, "low")]),
                 lift=lambda x: -torch.sin(PI * x[..., :1]), continuation=(0.1, 0.01 / PI))  # fmt: skip


def allen_cahn(solve) -> Solution:
    def equation(model, x):
        u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - 0.001 * u_xx - 5 * (u - u**3)

    box = (-1, 0), (1, 1)
    return solve(equation, *box, distance=BoxDistance(*box, sides=[(0, "low"), (0, "high"), (1, "low")]),
                 lift=lambda x: x[..., :1] ** 2 * torch.cos(PI * x[..., :1]))  # fmt: skip


def klein_gordon(solve) -> Solution:
    def equation(model, x):
        u, _, (u_xx, u_tt) = jet(model, x)
        wave = x[:, :1] * torch.cos(x[:, 1:])
        return u_tt - u_xx + u**2 + wave - wave**2

    def lift(x):
        return x[..., :1] + x[..., :1] ** 3 * (torch.cos(x[..., 1:]) - 1)

    walls = BoxDistance((-1, 0), (1, 10), sides=[(0, "low"), (0, "high"), (1, "low")], twice=[(1, "low")])
    return solve(equation, (-1, 0), (1, 10), distance=walls, lift=lift)


def kovasznay(solve) -> Solution:
    def equation(model, x):
        values, (along, across), laplacian = jet(model, x, collapse=True)
        u, v, _ = values.split(1, 1)
        momentum = u * along[:, :2] + v * across[:, :2] - laplacian[:, :2] / 20
        pressure = torch.cat([along[:, 2:], across[:, 2:]], 1)
        return torch.cat([momentum + pressure, along[:, :1] + across[:, 1:2]], 1)

    def boundary(model, x, flow):
        return model(x)[:, :2] - flow

    points, _ = side_points((-0.5, -0.5), (1, 1.5), 100)
    outlet = torch.tensor([[1.0, 0.0]]).double()
    return solve(equation, (-0.5, -0.5), (1, 1.5), distance=lambda x: torch.ones(len(x), 3, dtype=x.dtype),
                 terms=[(boundary, (points, kovasznay_flow(points)[:, :2]), 1000.0),
                        (lambda model, x: model(x)[:, 2:] - kovasznay_flow(x)[:, 2:], outlet, 100.0)])  # fmt: skip


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


def lorenz_constants(solve) -> Solution:
    def equation(model, t, sigma, rho, beta):
        (x, y, z), (velocity,) = jet(model, t)[0].split(1, 1), jet(model, t)[1]
        return velocity - torch.cat([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], 1)

    def data(model, t, observed):
        return model(t) - observed

    start = torch.tensor([-8.0, 7, 27]).double()
    return solve(equation, [0], [3], distance=lambda t: t, lift=lambda t: start + 0 * t,
                 terms=[(data, lorenz_observations())], unknowns={"sigma": 1.0, "rho": 1.0, "beta": 1.0})  # fmt: skip


def diffusion_constant(solve) -> Solution:
    def equation(model, x, c):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - c * u_xx + torch.exp(-x[:, 1:]) * (1 - PI**2) * torch.sin(PI * x[:, :1])

    x = torch.cartesian_prod(torch.linspace(-1, 1, 10), torch.ones(1)).double()
    data = (lambda model, x, u: model(x) - u, (x, diffusion_exact(x)))
    walls_and_start = BoxDistance((-1, 0), (1, 1), sides=[(0, "low"), (0, "high"), (1, "low")])
    return solve(equation, (-1, 0), (1, 1), distance=walls_and_start, lift=lambda x: torch.sin(PI * x[..., :1]),
                 terms=[data], unknowns={"c": 2.0})  # fmt: skip


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


def kovasznay_flow(x: Tensor) -> Tensor:
    """Return the exact u, v and p at Reynolds number 20."""
    return torch.cat(flow(x[:, :1], x[:, 1:], 20.0, torch), 1)


def diffusion_exact(x: Tensor) -> Tensor:
    return torch.sin(PI * x[:, :1]) * torch.exp(-x[:, 1:])


def lorenz_observations() -> tuple[Tensor, Tensor]:
    times = torch.linspace(0, 3, 25).double()
    return times[:, None], torch.from_numpy(integrate(lorenz, times.numpy(), LORENZ_START))


def allen_cahn_exact(x: Tensor) -> Tensor:
    """By Chebyshev collocation in x and Radau in t."""
    count = 200
    nodes = chebyshev.chebpts2(count + 1)
    vandermonde = chebyshev.chebvander(nodes, count)
    second = torch.tensor(
        [chebyshev.chebval(nodes, chebyshev.chebder(row, 2)) for row in torch.eye(count + 1).numpy()]
    ).T.numpy()
    second = second @ torch.linalg.inv(torch.tensor(vandermonde)).numpy()

    def right(t, u):
        slope = 0.001 * second @ u + 5 * (u - u**3)
        slope[[0, -1]] = 0
        return slope

    times, place = torch.unique(x[:, 1], return_inverse=True)
    start = nodes**2 * torch.cos(PI * torch.tensor(nodes)).numpy()
    found = solve_ivp(right, (0, 1), start, "Radau", rtol=1e-9, atol=1e-10, t_eval=times.numpy())
    values = torch.linalg.solve(torch.tensor(vandermonde), torch.tensor(found.y))  # (count + 1, times)
    basis = torch.tensor(chebyshev.chebvander(x[:, 0].numpy(), count))
    return (basis * values.T[place]).sum(1, keepdim=True)


def burgers_exact(x: Tensor) -> Tensor:
    place, time = x.numpy().T
    return torch.from_numpy(cole_hopf(place, time, 0.01 / PI))[:, None]


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
    """What a user writes, the exact solution at points, the box, and the true constants."""

    write: Callable[..., Solution]
    exact: Callable[[Tensor], Tensor] | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    constants: dict[str, float] = {}  # noqa: RUF012 (never changed)
    inside: Callable[[Tensor], Tensor] | None = None


def product_of_sines(rate: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.sin(rate * x).prod(1, keepdim=True)


def sine(x: Tensor) -> Tensor:
    return torch.sin(PI * x[:, :1])


def square(x: Tensor) -> Tensor:
    return (x + 1) ** 2


L_SHAPE = polygon([(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (-1, 1)])
HOLE = disk((0, 0), 0.25)
LORENZ = {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3}

DEMOS = {
    "system of two ODEs": Demo(ode_system, lambda t: torch.cat([t.sin(), t.cos()], 1), (0,), (10,)),
    "ODE of second order": Demo(
        second_order,
        lambda t: 50 / 81 + 5 / 9 * t + 31 / 81 * torch.exp(9 * t) - 2 * torch.exp(t),
        (0,),
        (0.25,),
    ),
    "Lotka-Volterra, four periods": Demo(lotka_volterra, populations, (0,), (1,)),
    "Poisson": Demo(poisson, sine, (-1,), (1,)),
    "Poisson, Neumann": Demo(poisson_neumann, square, (-1,), (1,)),
    "Poisson, Robin": Demo(poisson_robin, square, (-1,), (1,)),
    "Poisson, L-shape": Demo(
        l_shape,
        lambda x: torch.tensor(l_shape_reference()[0](x.numpy())).view(-1, 1),
        (-1, -1),
        (1, 1),
        inside=L_SHAPE.inside,
    ),
    "Euler's beam": Demo(beam, lambda x: -(x**4) / 24 + x**3 / 6 - x**2 / 4, (0,), (1,)),
    "Laplace on a disk": Demo(laplace_disk, lambda x: x[:, :1] * torch.cos(x[:, 1:]), (0, 0), (1, 2 * PI)),
    "Helmholtz": Demo(helmholtz, product_of_sines(4 * PI), (0, 0), (1, 1)),
    "Helmholtz, hole": Demo(
        helmholtz_hole, product_of_sines(2 * PI), (-0.5, -0.5), (0.5, 0.5), inside=lambda x: ~HOLE.inside(x)
    ),
    "heat": Demo(heat, lambda x: sine(x) * torch.exp(-0.4 * PI**2 * x[:, 1:]), (0, 0), (1, 1)),
    "diffusion": Demo(diffusion, diffusion_exact, (-1, 0), (1, 1)),
    "diffusion and reaction": Demo(
        diffusion_reaction,
        lambda x: torch.exp(-x[:, 1:]) * (torch.sin(WAVES * x[:, :1]) / WAVES).sum(1, keepdim=True),
        (-PI, 0),
        (PI, 1),
    ),
    "Burgers": Demo(burgers, burgers_exact, (-1, 0), (1, 1)),
    "Allen-Cahn": Demo(allen_cahn, allen_cahn_exact, (-1, 0), (1, 1)),
    "Klein-Gordon": Demo(klein_gordon, lambda x: x[:, :1] * torch.cos(x[:, 1:]), (-1, 0), (1, 10)),
    "Kovasznay flow": Demo(kovasznay, kovasznay_flow, (-0.5, -0.5), (1, 1.5)),
    "Schroedinger": Demo(schroedinger, schroedinger_exact, (-5, 0), (5, PI / 2)),
    "wave, speed 10": Demo(
        wave,
        lambda x: (
            sine(x) * torch.cos(10 * PI * x[:, 1:]) + torch.sin(2 * PI * x[:, :1]) * torch.cos(20 * PI * x[:, 1:])
        ),
        (0, 0),
        (1, 1),
    ),
    "Lorenz, three constants": Demo(lorenz_constants, None, (0,), (3,), LORENZ),
    "diffusion, constant": Demo(diffusion_constant, None, (-1, 0), (1, 1), {"c": 1.0}),
    "unknown field": Demo(unknown_field, lambda x: torch.cat([sine(x), -(PI**2) * sine(x)], 1), (-1,), (1,)),
}


def error_of(demo: Demo, solution: Solution) -> float:
    """The relative L2 error; of constants the largest relative error; of the L-shape the residual's share."""
    if demo.constants:
        found = solution.unknowns
        return max(abs(found[name].value / value - 1) for name, value in demo.constants.items())
    x = box_points(demo.low, demo.high, 4000, seed=7)
    if demo.inside is not None:
        x = x[demo.inside(x)]
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
        error, seconds = (sorted(run[key] for run in runs)[len(runs) // 2] for key in ("error", "seconds"))
        peers = [min(run["errors"].values()) for run in record["peers"].get(name, [])]
        peer = f"{sorted(peers)[len(peers) // 2]:.1e}" if peers else ""
        spent = f"{record['peers'][name][0]['seconds']:.0f}" if peers else ""
        lines.append([name, lines_of(DEMOS[name].write), f"{error:.1e}", f"{seconds:.0f}", peer, spent])
    return table("| demo | lines | error | CPU s | DeepXDE | its CPU s |", lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="eight minutes on one core, with --peers seven more",
        writes="demos.json, demos.md",
        folder=command_line.RESULTS / "pde",
        quick="one demo, a second: to see it run",
    )
    parser.add_choices("--demos", DEMOS)
    parser.add_seeds(0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--peers", action="store_true", help="five demos by DeepXDE, too")
    args = parser.parse_args()
    seconds = 1.0 if args.quick else args.seconds
    demos = args.demos[3:4] if args.quick else args.demos
    record = Record.of(args, "demos", {"seconds": seconds}, peers={})
    record.complete(product(args.seeds, demos), lambda seed, name: run(name, seed, seconds))
    if args.peers:
        from problems.deepxde_peers import PEERS, solve_by_deepxde

        def solve_by_peer(seed: int, name: str) -> dict:
            return solve_by_deepxde(name, DEMOS[name].exact, seed, seconds)

        record.complete(product(args.seeds, PEERS), solve_by_peer, group="peers")
    record.write_page(markdown)


if __name__ == "__main__":
    main()
