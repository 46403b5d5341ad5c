# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How often the 95 % intervals of `calibrate` hold the truth, if the family is coarse.

Shown in docs/parametric.md.

    python examples/studies/parametric/coverage.py --label after
    python examples/studies/parametric/coverage.py --quick                # for CI: says nothing

The equation is u'' = f'' with u = 0 at both ends of [-1, 1]. f is a bump or a wave, with one parameter or two, and the
family has so few members that its error counts. A cell is a number of data at random places, and Gaussian noise as a
multiple of the family's error, the root mean square over parameters and places. The least error that any method can
expect is that of the exact solution with known noise. "Width" is the median of the intervals' standard errors, "error"
the root mean square of the errors, both divided by this least one.

Shares, widths and errors are those of data sets that `calibrate` does not refuse as a misfit; "refused" counts others.
The recipe was chosen on another problem, a sine, with seed 0.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from study_tools import files, tables
from torch import Tensor, nn
from torch.func import jacfwd, jvp

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import HardConstraint


torch.set_num_threads(1)

POINTS = torch.linspace(-1, 1, 60, dtype=torch.float64).unsqueeze(1)
PLACES = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(1)
CELLS = ((40, 1), (40, 5), (400, 5), (400, 20))  # data, and noise as a multiple of the family's error
Point = tuple[float, ...]


@dataclass(frozen=True)
class Problem:
    """A function f(x, first, second), and the grid of the members in its two parameters.

    With one parameter, the second is the middle of its members.
    """

    function: Callable[..., Tensor]
    first: tuple[float, ...]
    second: tuple[float, ...]

    def members(self, dim: int) -> list[Point]:
        return list(itertools.product(self.first, self.second)) if dim == 2 else [(value,) for value in self.first]

    def curve(self, x: Tensor, *parameters: Tensor | float) -> Tensor:
        return self.function(x, *parameters, *[np.mean(self.second)] * (2 - len(parameters)))

    def exact(self, x: Tensor, point: Point) -> Tensor:
        left, right = self.curve(x.new_tensor([-1.0, 1.0]), *point)
        return self.curve(x, *point) - (left * (1 - x) + right * (1 + x)) / 2

    def equation(self, u: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return jvp(lambda x: self.curve(x, *parameters), (x,), (torch.ones_like(x),))[1]

        _, second = jvp(slope, (x,), (torch.ones_like(x),))
        return jet(u, x)[2][0] - second

    def terms_of(self, parameter: float | Point) -> list[tuple]:
        columns = [torch.full_like(POINTS, value) for value in np.ravel(parameter)]
        return [(self.equation, (POINTS, *columns))]

    def sensitivities(self, x: Tensor, point: Point) -> Tensor:
        """The derivatives (n, parameters) of the solution in the parameters."""
        places = torch.tensor(point, dtype=x.dtype)
        return jacfwd(lambda values: self.exact(x, tuple(values)).flatten())(places)


def bump(x: Tensor, center: Tensor | float, width: Tensor | float) -> Tensor:
    return torch.exp(-(((x - center) / width) ** 2))


def wave(x: Tensor, frequency: Tensor | float, growth: Tensor | float) -> Tensor:
    return torch.exp(growth * x) * torch.cos(frequency * x)


PROBLEMS = {
    "bump": Problem(bump, (-0.3, -0.1, 0.1, 0.3), (0.35, 0.5)),
    "wave": Problem(wave, (2.5, 3.0, 3.5, 4.0), (0.2, 0.6)),
}


def solution_of(network: nn.Module, _: float | Point) -> nn.Module:
    return HardConstraint(network, lambda x: 1 - x**2)


def as_parameter(point: Point) -> float | Point:
    return point[0] if len(point) == 1 else point


def family_of(problem: Problem, dim: int, seed: int) -> ParametricAdapter:
    members = [as_parameter(point) for point in problem.members(dim)]
    middle = as_parameter(tuple(np.mean(problem.members(dim), axis=0).tolist()))
    torch.manual_seed(seed)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    LevenbergMarquardt(solution_of(base, middle), floor=1e-6).fit(problem.terms_of(middle), 25, progress=False)
    family = ParametricAdapter(base, problem.terms_of, 6, solution_of=solution_of)
    family.fit(members, progress=False)
    return family


def run(name: str, dim: int, seed: int, sets: int) -> list[dict]:
    problem = PROBLEMS[name]
    family = family_of(problem, dim, seed)
    generator = np.random.default_rng(seed)
    low, high = np.min(problem.members(dim), axis=0), np.max(problem.members(dim), axis=0)
    margin = (high - low) / 10
    points = [tuple(point) for point in generator.uniform(low + margin, high - margin, (sets, dim)).tolist()]
    with torch.no_grad():
        errors = [family.predict(point)(PLACES) - problem.exact(PLACES, point) for point in points]
    own = torch.cat(errors).square().mean().sqrt().item()

    cells = []
    for rows, multiple in CELLS:
        noise = multiple * own
        start, found, refused = time.process_time(), [], 0
        for point in points:
            x = torch.from_numpy(generator.uniform(-1, 1, (rows, 1)))
            data = problem.exact(x, point) + noise * torch.from_numpy(generator.normal(size=(rows, 1)))
            slopes = problem.sensitivities(x, point)
            least = noise * torch.linalg.inv(slopes.T @ slopes).diagonal().sqrt().numpy()
            try:
                result = family.calibrate(lambda u, x=x, data=data: u(x) - data)
            except ValueError:
                refused += 1
                continue
            found.append((np.subtract(result.parameter, point) / least, np.ravel(result.error) / least))
        differences, widths = np.array(found).swapaxes(0, 1)
        cells.append(
            {
                "problem": name,
                "parameters": dim,
                "rows": rows,
                "noise": multiple,
                "family": own,
                "refused": refused,
                "held": (100 * (abs(differences) < 1.96 * widths).mean(0)).tolist(),
                "width": np.median(widths, axis=0).tolist(),
                "error": np.sqrt(np.square(differences).mean(0)).tolist(),
                "seconds": (time.process_time() - start) / sets,
            }
        )
        print(cells[-1], flush=True)
    return cells


def table(results: dict[str, list[dict]]) -> str:
    """A row for each number of parameters and cell: shares of each parameter, widths and errors of the worst one."""
    labels = list(results)
    lines = []
    for dim, (rows, noise) in itertools.product((1, 2), CELLS):
        texts = [str(dim), str(rows), str(noise)]
        for label in labels:
            key = (dim, rows, noise)
            cells = [cell for cell in results[label] if (cell["parameters"], cell["rows"], cell["noise"]) == key]
            texts.append(", ".join(" and ".join(f"{share:.0f}" for share in cell["held"]) for cell in cells))
            texts.append(", ".join(str(cell["refused"]) for cell in cells))
            texts.append("; ".join(f"{max(cell['width']):.1f}, {max(cell['error']):.1f}" for cell in cells))
        lines.append(texts)
    columns = " | ".join(f"held, {label} (%) | refused | width, error" for label in labels)
    return tables.table(f"| parameters | data | noise / family's error | {columns} |", lines, left=0)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about four minutes of one core",
        writes="coverage.json, coverage.md",
        folder=command_line.RESULTS / "parametric",
        quick="one problem and three data sets",
    )
    parser.add_argument("--label", default="now", help="the name of these results in the file, which keeps others")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    problems, sets = (["bump"], 3) if args.quick else ([*PROBLEMS], 50)
    path = files.path_of(args, "coverage")
    results = files.read(path).get("results", {})
    results[args.label] = [cell for name in problems for dim in (1, 2) for cell in run(name, dim, 100, sets)]
    files.write(path, {"results": results})
    files.write_page(path, table(results))


if __name__ == "__main__":
    main()
