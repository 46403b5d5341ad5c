# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Unknown constants by `solve(unknowns=)`: three inverse problems of DeepXDE's demos, exact data and data with noise.

Shown in docs/pde_results.md.

python examples/studies/pde/unknowns.py             # 3 exact runs, and 20 draws of noise for each problem
python examples/studies/pde/unknowns.py --draws 0   # the exact runs alone
python examples/studies/pde/unknowns.py --quick     # tiny, to see it run

Lorenz' equations (three constants from 25 observations), diffusion (one from 10) and a reaction with diffusion (two
from 100). Noise is 1 % of the root mean square of each function. Budgets are CPU seconds on one thread, which include
the errors. Runs that are in unknowns.json are not repeated.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from problems.families import chebyshev
from problems.odes import LORENZ_START, integrate, lorenz
from scipy.integrate import solve_ivp
from scipy.interpolate import BarycentricInterpolator
from study_tools.records import Record, on_cpu_clock
from study_tools.tables import table
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, solve
from peft_lotra.pde.solution import Solution


torch.set_num_threads(1)

NOISE = 0.01
Data = tuple[Tensor, Tensor]  # points, and values there


def observed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The misfit of observations."""
    return model(x) - y


def lorenz_data() -> Data:
    times = np.linspace(0, 3, 26)[1:]
    return torch.tensor(times).unsqueeze(1), torch.tensor(integrate(lorenz, times, LORENZ_START))


def solve_lorenz(data: Data, **options: Any) -> Solution:
    def equation(model, t, sigma, rho, beta):
        u, (du,), _ = jet(model, t)
        x, y, z = u.unbind(1)
        return du - torch.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], 1)

    start = torch.tensor(LORENZ_START, dtype=torch.float64)
    conditions = {"distance": lambda t: t, "lift": lambda t: start.expand(*t.shape[:-1], 3)}
    unknowns = {"sigma": 1.0, "rho": 1.0, "beta": 1.0}
    return solve(equation, [0], [3], **conditions, terms=[(observed, data)], unknowns=unknowns, **options)


def diffusion_data() -> Data:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[1:-1]
    return torch.stack([x, torch.ones_like(x)], 1), math.exp(-1) * torch.sin(math.pi * x).unsqueeze(1)


def solve_diffusion(data: Data, **options: Any) -> Solution:
    def diffusion(model, x, C):
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - C * u_xx + torch.exp(-x[:, 1:]) * torch.sin(math.pi * x[:, :1]) * (1 - math.pi**2)

    box = (-1, 0), (1, 1)
    distance = BoxDistance(*box, sides=[(0, "low"), (0, "high"), (1, "low")])
    conditions = {"distance": distance, "lift": lambda x: torch.sin(math.pi * x[..., :1])}
    return solve(diffusion, *box, **conditions, terms=[(observed, data)], unknowns={"C": 2.0}, **options)


def reaction_data(nodes: int = 64) -> Data:
    """The method of lines by Chebyshev polynomials."""
    z, slopes = chebyshev(nodes)
    second = (2 * slopes @ (2 * slopes))[1:-1]

    def ends(inner: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(inner[:1]), inner, np.ones_like(inner[:1])])

    def rates(t: float, u: np.ndarray) -> np.ndarray:
        a, b = map(ends, np.split(u, 2))
        rate = 0.1 * (a * b**2)[1:-1]
        return np.r_[2e-3 * second @ a - rate, 2e-3 * second @ b - 2 * rate]

    times, places = np.linspace(1, 10, 10), np.linspace(0.05, 0.95, 10)
    start = np.exp(-10 * (z[1:-1] + 1))
    path = solve_ivp(rates, (0, 10), np.r_[start, start], "BDF", times, rtol=1e-11, atol=1e-13).y
    a, b = (BarycentricInterpolator((z + 1) / 2, ends(inner))(places) for inner in np.split(path, 2))
    points = np.stack(np.meshgrid(places, times, indexing="ij"), -1).reshape(-1, 2)
    return torch.tensor(points), torch.tensor(np.stack([a.ravel(), b.ravel()], 1))


def solve_reaction(data: Data, unknowns: dict[str, float] | None = None, **options: Any) -> Solution:
    def reaction(model, x, D, k):
        u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        rate = k * u[:, 0] * u[:, 1] ** 2
        return u_t - D * u_xx + torch.stack([rate, 2 * rate], 1)

    box = (0, 0), (1, 10)
    distance = BoxDistance(*box, sides=[(0, "low"), (0, "high"), (1, "low")])
    options = {"lift": initial_values} | options
    starts = unknowns or {"D": 1e-3, "k": 0.05}
    intervals = {name: (start, 0, None) for name, start in starts.items()}
    return solve(reaction, *box, distance=distance, terms=[(observed, data)], unknowns=intervals, **options)


def solve_reaction_twice(data: Data, seconds: float, **options: Any) -> Solution:
    """The first solution gives the constants of the part that is not smooth at (0, 0), for the second."""
    first = solve_reaction(data, seconds=seconds / 3, **options)
    D, k = (first.unknowns[name].value for name in ("D", "k"))  # noqa: N806
    slopes = torch.tensor([400 * D - k, 400 * D - 2 * k], dtype=torch.float64)
    lift = lambda x: initial_values(x) + slopes * corner(x, D)  # noqa: E731
    return solve_reaction(data, {"D": D, "k": k}, lift=lift, seconds=2 * seconds / 3, **options)


def initial_values(x: Tensor) -> Tensor:
    """Of both functions, without e^-20 at (1, 0), which the boundary value 0 contradicts."""
    both = x[..., :1].expand(*x.shape[:-1], 2)
    return torch.exp(-20 * both) - both * math.exp(-20)


def corner(x: Tensor, diffusion: float) -> Tensor:
    """The part of a solution that is not smooth at (0, 0), for a slope of one.

    The equation asks for u_t = slope there, the boundary value for u_t = 0. This is the solution of u_t = D u_xx for
    x > 0 with u = 0 at t = 0 and u = -t at x = 0, plus t, which makes it zero on both sides.
    """
    place, time = x[..., :1], x[..., 1:]
    z = place / (4 * diffusion * time.clamp(min=1e-12)).sqrt()
    decay = (1 + 2 * z**2) * torch.erfc(z) - 2 * z * torch.exp(-(z**2)) / math.sqrt(math.pi)
    return (1 - place) * torch.exp(-time) * time * (1 - decay)


@dataclass
class Problem:
    """An inverse problem.

    Attributes:
        seconds: The CPU seconds of a run with exact data, and of a draw of noise.
        solve_exact: For exact data, if it is not `solve`.
    """

    title: str
    constants: dict[str, float]
    data: Callable[[], Data]
    solve: Callable[..., Solution]
    seconds: tuple[float, float]
    solve_exact: Callable[..., Solution] | None = None


PROBLEMS = {
    "lorenz": Problem("Lorenz", {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3}, lorenz_data, solve_lorenz, (60.0, 60.0)),
    "diffusion": Problem("diffusion", {"C": 1.0}, diffusion_data, solve_diffusion, (20.0, 20.0)),
    "reaction": Problem(
        "reaction",
        {"D": 2e-3, "k": 0.1},
        reaction_data,
        solve_reaction,
        (180.0, 60.0),
        solve_exact=solve_reaction_twice,
    ),
}


def run(problem: Problem, seed: int, noise: float, seconds: float) -> dict:
    """Solve one problem, and return the estimates."""
    points, values = problem.data()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    values = values + noise * values.square().mean(0).sqrt() * draws
    solve_problem = problem.solve
    if noise == 0 and problem.solve_exact is not None:
        solve_problem = problem.solve_exact
    solution, report = on_cpu_clock(
        lambda: solve_problem((points, values), seconds=seconds, seed=seed, progress=False)
    )
    estimates = {name: list(estimate) for name, estimate in solution.unknowns.items()}
    return {"seed": seed, "estimates": estimates, **report}


def markdown(record: dict) -> str:
    """The relative errors by exact data, and the coverage by noise."""
    text = (
        "Relative errors with exact data. With noise of 1 %: the median standard error, and how many of the draws "
        "have the truth in value +- 1.96 error."
    )
    lines = []
    covered = total = 0
    for name, problem in PROBLEMS.items():
        exact, noisy = (record["results"].get(name, {}).get(kind, []) for kind in ("exact", "noise"))
        for constant, truth in problem.constants.items():
            errors = [abs(run["estimates"][constant][0] / truth - 1) for run in exact]
            pairs = [run["estimates"][constant] for run in noisy]
            inside = sum(abs(value - truth) <= 1.96 * error for value, error in pairs)
            covered, total = covered + inside, total + len(pairs)
            cells = [problem.title, constant, f"{truth:.4g}"]
            cells += (
                [f"{max(errors):.1e}", f"{statistics.median(r['seconds'] for r in exact):.0f}"] if exact else ["", ""]
            )
            if noisy:
                share = statistics.median(100 * error / truth for _, error in pairs)
                seconds = statistics.median(r["seconds"] for r in noisy)
                cells += [f"{share:.2g}", str(inside), str(len(pairs)), f"{seconds:.0f}"]
            else:
                cells += [""] * 4
            lines.append(cells)
    header = "| problem | constant | truth | error, exact data | CPU s | standard error, % | covered | draws | CPU s |"
    text += f"\n\n{table(header, lines, left=2)}"
    if total:
        text += f"\nOf all {total} intervals, {100 * covered / total:.0f} % contain the true value.\n"
    return text


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="50 minutes on one core",
        writes="unknowns.json, unknowns.md",
        folder=command_line.RESULTS / "pde",
        quick="two seconds a run: to see it run",
    )
    parser.add_choices("--problems", PROBLEMS)
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    draws = 1 if args.quick else args.draws
    budgets = {name: problem.seconds for name, problem in PROBLEMS.items()}
    record = Record.of(args, "unknowns", {"noise": NOISE, "seconds": budgets})

    def measure(seed: int, name: str, kind: str) -> dict:
        is_noisy = kind == "noise"
        seconds = 2.0 if args.quick else PROBLEMS[name].seconds[is_noisy]
        return run(PROBLEMS[name], seed, NOISE if is_noisy else 0.0, seconds)

    runs = [(100, name, "exact") for name in args.problems]
    for draw in range(draws):
        runs += [(101 + draw, name, "noise") for name in args.problems]
    record.complete(runs, measure)
    record.write_page(markdown)


if __name__ == "__main__":
    main()
