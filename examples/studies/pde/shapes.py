# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Two equations on shapes by one call of `solve` each: a re-entrant corner, and Neumann data around a hole.

Shown in docs/pde_results.md.

python examples/studies/pde/shapes.py                      # 15 runs of at most 60 CPU seconds
python examples/studies/pde/shapes.py --seeds 1
python examples/studies/pde/shapes.py --redraw             # the picture again, of one more run of two problems
python examples/studies/pde/shapes.py --quick              # tiny, to see it run

L-shape: -lap u = 1 on [-1, 1]^2 without a quarter, u = 0 on the edges. At the corner, u is c r^(2/3) sin(2 theta / 3)
and smoother terms, whose derivatives are not bounded. The reference is a sum of functions that satisfy the equation,
fitted on the edges; by the maximum principle its error is nowhere larger than on the edges, 4e-9.

Helmholtz: lap u + 2 pi^2 u = 0 on [-1, 1]^2 without a disk, u = 0 on the square, and the normal derivative of
sin(pi x) sin(pi y), which is the solution, on the circle.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import math
import statistics
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from study_tools import pictures
from study_tools.records import Record, on_cpu_clock
from study_tools.tables import table
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, disk, polygon, robin, solve
from peft_lotra.pde.solution import Solution


torch.set_num_threads(1)

SQUARE = (-1.0, -1.0), (1.0, 1.0)
CORNERS = [(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (-1, 1)]
L_SHAPE = polygon(CORNERS)
BEST = "L-shape, the corner in the lift, the equation times the distance"
HELMHOLTZ = "Helmholtz, Neumann data on a hole"
HOLE = disk((0.2, -0.1), 0.4)
PLATE = polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)]) - HOLE


# The L-shape


@cache
def l_shape_reference(poles: int = 60, degree: int = 20) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Return u = h - |x|^2 / 4 and its largest error on the edges, with h harmonic and |x|^2 / 4 there.

    h is the real part of a polynomial and of simple poles outside, which cluster exponentially at the vertices: A.
    Gopal and L. N. Trefethen, "Solving Laplace problems with corner singularities via rational functions" (2019).
    """
    vertices = np.array([complex(*corner) for corner in CORNERS])
    following = np.roll(vertices, -1)
    edges = (following - vertices) / abs(following - vertices)
    outward = -1j * (edges + np.roll(edges, 1))
    gaps = np.exp(-4 * (math.sqrt(poles) - np.sqrt(np.arange(1, poles + 1))))
    centers = np.concatenate([z + normal / abs(normal) * gaps for z, normal in zip(vertices, outward, strict=True)])

    def basis(z: np.ndarray) -> np.ndarray:
        powers = (z[:, None] / 1.5) ** np.arange(degree + 1)
        simple = np.tile(gaps, len(vertices)) / (z[:, None] - centers)
        values = np.concatenate([powers, simple], 1)
        return np.concatenate([values.real, values.imag], 1)

    def on_edges(share: np.ndarray) -> np.ndarray:
        halves = [a + (b - a) * share / 2 for a, b in zip(vertices, following, strict=True)]
        return np.concatenate([*halves, *(b + (a - b) * share / 2 for a, b in zip(vertices, following, strict=True))])

    z = on_edges(np.exp(np.linspace(-35, 0, 300)))
    matrix = basis(z)
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1.0  # the imaginary part of 1
    weights = np.linalg.lstsq(matrix / norms, abs(z) ** 2 / 4, rcond=1e-14)[0] / norms
    check = on_edges(np.exp(np.random.default_rng(0).uniform(-30, 0, 3000)))
    error = abs(basis(check) @ weights - abs(check) ** 2 / 4).max()
    return lambda x: basis(x[:, 0] + 1j * x[:, 1]) @ weights - (x**2).sum(1) / 4, float(error)


def intensity() -> float:
    """Return c of c r^(2/3) sin(2 theta / 3), from the reference on the bisector."""
    u, _ = l_shape_reference()
    r = 1e-4
    return float(u(r / math.sqrt(2) * np.array([[-1.0, 1.0]]))[0] / r ** (2 / 3))


def poisson(model: nn.Module, x: Tensor) -> Tensor:
    return jet(model, x, collapse=True)[2] + 1


def corner(x: Tensor) -> Tensor:
    """r^(2/3) sin(2 theta / 3), zero on both edges of the corner, with an angle that jumps outside only."""
    right, up = x[..., :1], x[..., 1:2]
    theta = torch.atan2(-right - up, up - right) + 3 * math.pi / 4
    return (right**2 + up**2) ** (1 / 3) * torch.sin(2 * theta / 3)


def other_edges(x: Tensor) -> Tensor:
    """Zero on the other four edges, and 1 at the corner."""
    return (1 - x[..., :1] ** 2) * (1 - x[..., 1:2] ** 2)


class Corner(nn.Module):
    """c corner(x), zero on all edges, with a coefficient that is trained with the network."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficient * corner(x) * other_edges(x)


def poisson_times_distance(model: nn.Module, x: Tensor) -> Tensor:
    """Bounded at the corners; by Hardy's inequality, its norm bounds the error of u and of its slopes."""
    return L_SHAPE.distance(x) * poisson(model, x)


def l_shape(equation: Callable = poisson, **conditions: Any) -> Callable[..., Solution]:
    def run(**options: Any) -> Solution:
        made = {name: part() if isinstance(part, type) else part for name, part in conditions.items()}
        return solve(equation, *SQUARE, inside=L_SHAPE.inside, **made, **options)

    return run


# Helmholtz around a hole


def helmholtz(model: nn.Module, x: Tensor) -> Tensor:
    u, _, laplacian = jet(model, x, collapse=True)
    return laplacian + 2 * math.pi**2 * u


def waves(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def hole(**options: Any) -> Solution:
    points, outward = HOLE.boundary(200)
    normals = -outward  # out of the plate
    x, y = math.pi * points[:, 0], math.pi * points[:, 1]
    slopes = math.pi * torch.stack([torch.cos(x) * torch.sin(y), torch.sin(x) * torch.cos(y)], 1)
    term = robin(points, normals, 0.0, 1.0, (slopes * normals).sum(1))
    return solve(helmholtz, *SQUARE, distance=BoxDistance(*SQUARE), terms=[term], inside=PLATE.inside, **options)


RUNS = {
    BEST: l_shape(poisson_times_distance, distance=L_SHAPE.distance, lift=Corner),
    "L-shape, a corner with a coefficient in the lift": l_shape(distance=L_SHAPE.distance, lift=Corner),
    "L-shape, the corner as distance": l_shape(distance=lambda x: corner(x) * other_edges(x)),
    "L-shape, no singular function": l_shape(distance=L_SHAPE.distance),
    HELMHOLTZ: hole,
}
DRAWN = [BEST, HELMHOLTZ]


def measure(name: str, result: Solution) -> dict[str, float]:
    """Return relative errors on a grid of 201 x 201 points that are inside."""
    line = torch.linspace(-1, 1, 203, dtype=torch.float64)[1:-1]
    x = torch.cartesian_prod(line, line)
    x = x[result.inside(x)]
    exact = waves(x) if name.startswith("Helmholtz") else torch.from_numpy(l_shape_reference()[0](x.numpy()))[:, None]
    error = (result.model(x).detach() - exact).abs()
    found = {"error": (error.norm() / exact.norm()).item(), "largest": (error.max() / exact.abs().max()).item()}
    if isinstance(result.model.lift, Corner):
        found["coefficient"] = result.model.lift.coefficient.item()
    return found


def run(name: str, seed: int, seconds: float) -> tuple[Solution, dict[str, Any]]:
    """Return the solution of a run, and its record."""
    solution, report = on_cpu_clock(lambda: RUNS[name](seed=seed, seconds=seconds, progress=False))
    ended = solution.phases[-1].reason
    return solution, {"seed": seed, **measure(name, solution), **report, "ended": ended}


def markdown(record: dict) -> str:
    """Return the table of medians."""
    text = (
        f"Medians (worst) over seeds of `solve` within {record['recipe']['seconds']:g} CPU s. The reference of the "
        f"L-shape has an error below {record['reference_error']:.0e}, and c = {record['intensity']:.5f}."
    )
    lines = []
    for name in RUNS:
        if runs := record["results"].get(name):
            columns = [[found[key] for found in runs] for key in ("error", "largest")]
            errors = [f"{statistics.median(values):.1e} ({max(values):.1e})" for values in columns]
            coefficients = [found["coefficient"] for found in runs if "coefficient" in found]
            coefficient = f"{statistics.median(coefficients):.4f}" if coefficients else ""
            seconds = statistics.median(found["seconds"] for found in runs)
            lines.append([name, *errors, coefficient, f"{seconds:.0f}", len(runs)])
    header = "| shape | relative L2 error | largest error / largest u | c | CPU s | seeds |"
    return f"{text}\n\n{table(header, lines)}"


def draw(results: dict[str, Solution], path: Path) -> None:
    """Draw the solutions, and where their errors are."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 7), layout="constrained")
    line = torch.linspace(-1, 1, 203, dtype=torch.float64)[1:-1]
    x = torch.cartesian_prod(line, line)
    for (above, below), name in zip(axes.T, DRAWN, strict=True):
        result = results[name]
        is_blank = ~result.inside(x)
        u = result.model(x).detach()[:, 0]
        exact = waves(x)[:, 0] if name.startswith("Helmholtz") else torch.from_numpy(l_shape_reference()[0](x.numpy()))
        error = (u - exact).abs()
        u[is_blank] = error[is_blank] = math.nan
        for axis, values, title, limit in (
            (above, u, name.split(",")[0], None),
            (below, error.log10(), "log10 of the error", -8),
        ):
            mesh = axis.pcolormesh(line, line, values.view(201, 201).T, cmap="viridis", vmin=limit, rasterized=True)
            figure.colorbar(mesh)
            axis.set(title=title, xlabel="x", ylabel="y", aspect="equal")
            axis.grid(False)
    points, normals = HOLE.boundary(24)
    axes[0, 1].quiver(*points.T, *-normals.T, color=pictures.RED, scale=14, width=0.005)
    figure.suptitle("Solutions on shapes: arrows are the normals of the Neumann data")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="10 minutes on one core",
        writes="shapes.json, shapes.md, shapes.png",
        folder=command_line.RESULTS / "pde",
        quick="three seconds a run: to see it run",
        redraw=True,
    )
    parser.add_seeds(1, 2, 3)
    parser.add_choices("--runs", RUNS)
    args = parser.parse_args()
    seconds = 3.0 if args.quick else 60.0
    reference = {"reference_error": l_shape_reference()[1], "intensity": intensity()}
    record = Record.of(args, "shapes", {"seconds": seconds}, **reference)
    solutions = {}

    def solve_and_keep(seed: int, name: str) -> dict:
        solution, report = run(name, seed, seconds)
        if seed == args.seeds[0]:
            solutions[name] = solution
        return report

    if args.redraw:
        for name in DRAWN:
            solve_and_keep(args.seeds[0], name)
    else:
        record.complete(product(args.seeds, args.runs), solve_and_keep)
    if solutions.keys() >= set(DRAWN):
        draw(solutions, record.path.with_suffix(".png"))
    record.write_page(markdown)


if __name__ == "__main__":
    main()
