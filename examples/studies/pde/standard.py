# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The standard problems from scratch, by one recipe that is made of the building blocks of `peft_lotra.pde`.

python examples/studies/pde/standard.py                      # 25 runs, about a minute of one core each
python examples/studies/pde/standard.py --problems burgers --seeds 0
python examples/studies/pde/standard.py --references         # errors of the reference solutions
python examples/studies/pde/standard.py --quick              # tiny, to see it run

The recipe was made with Burgers, Allen-Cahn and Helmholtz, and not changed for Korteweg-de Vries and sine-Gordon. Runs
with the same recipe that are in standard.json are kept, and not repeated.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from problems.standard import NT, NX, PROBLEMS, Problem
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from peft_lotra.kan import KAN, KnotMap, refine_grid
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.pde import HardConstraint, ResidualSampler, box_points, gradient_weights, knot_density


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        width, grid_size: of the network [inputs, width, width, outputs].
        stages: parameters of the continuation, in equal ratios; a problem without one repeats its own.
        steps: of Levenberg-Marquardt at each parameter.
        last: steps at the last parameter, after the continuation.
        points, forgetting: collocation points, drawn anew for each step, and the factor by which Levenberg-Marquardt
            forgets former ones, during the continuation.
        last_points, last_forgetting: the same afterwards.
        slope_scale: of `gradient_weights`.
    """

    width: int = 8
    grid_size: int = 10
    stages: int = 6
    steps: int = 10
    last: int = 60
    points: int = 1500
    forgetting: float = 0.3
    last_points: int = 2000
    last_forgetting: float = 0.8
    slope_scale: float = 0.1


QUICK = Recipe(width=3, grid_size=4, stages=2, steps=2, last=3, points=150, last_points=200)


class Run:
    """One training; `curve` has the CPU seconds, the steps and the error after each stage."""

    def __init__(self, problem: Problem, recipe: Recipe, seed: int, console: Console) -> None:
        torch.manual_seed(seed)
        self.problem, self.recipe, self.seed, self.console = problem, recipe, seed, console
        widths = [problem.features.out_features, recipe.width, recipe.width, problem.outputs]
        self.kan = KAN(widths, grid_size=recipe.grid_size, dtype=torch.float64)
        self.model = HardConstraint(nn.Sequential(problem.features, self.kan), problem.distance, problem.lift)
        self.sampler = ResidualSampler(problem.low, problem.high, recipe.points, seed=1000 * seed)
        self.optimizer = LevenbergMarquardt(self.model, floor=1e-6, forgetting=recipe.forgetting)
        self.parameter = math.nan
        self.curve: list[tuple[float, int, float]] = []
        self.steps, self.seconds, self.clock = 0, 0.0, 0.0

    def train(self) -> None:
        recipe, problem = self.recipe, self.problem
        self.clock = time.process_time()
        for stage in range(recipe.stages):
            share = stage / (recipe.stages - 1)
            parameter = problem.start * (problem.stop / problem.start) ** share
            if stage and problem.start != problem.stop:
                self.move_grids()
            self.fit(parameter, recipe.steps)
        self.optimizer.forgetting = recipe.last_forgetting
        self.sampler.count = recipe.last_points
        for _ in range(3):
            self.fit(problem.stop, recipe.last // 3)

    def move_grids(self) -> None:
        """Knots where the solution is steep, and inner grids where the activations are."""
        low, high, features = self.problem.low, self.problem.high, self.problem.features
        density = torch.ones(features.out_features, 64, dtype=torch.float64)
        of_coordinates = knot_density(self.model, low, high)
        for j, i in enumerate(features.sources.tolist()):
            if i not in features.periodic:
                density[j] = of_coordinates[i]
        samples = features(box_points(low, high, 2000, seed=self.seed))
        refine_grid(self.kan, self.recipe.grid_size, samples, density=density, tolerance=math.inf)

    def knots(self) -> KnotMap | None:
        """The map of the knots, if it is one of the box's coordinates."""
        first = self.kan.layers[0]
        return first if isinstance(first, KnotMap) and not self.problem.features.periodic else None

    def fit(self, parameter: float, steps: int) -> None:
        problem, recipe = self.problem, self.recipe

        def residual(model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
            return weight * problem.residual(model, x, parameter)

        def weights(x: Tensor) -> Tensor:
            return gradient_weights(self.model, x, recipe.slope_scale)

        if parameter != self.parameter:
            self.optimizer.forget()  # residuals of another equation
            self.optimizer.damping = min(1e-2, 100 * self.optimizer.damping)
            self.parameter = parameter
        for _ in range(steps):
            x, _ = self.sampler.draw(lambda x: residual(self.model, x, weights(x)), self.knots())
            record = self.optimizer.step([(residual, (x, weights(x))), *problem.terms()])
            self.optimizer.damping = min(self.optimizer.damping, 1e3)
            self.steps += 1
        self.seconds += time.process_time() - self.clock
        error = problem.error(self.model)
        self.curve.append((self.seconds, self.steps, error))
        self.console.print(
            f"{problem.name} seed {self.seed}: parameter {parameter:.3g}, grid {self.kan.layers[-1].grid_size}, "
            f"loss {record.loss:.1e}, error {error:.2e} after {self.steps} steps, {self.seconds:.1f} CPU s"
        )
        self.clock = time.process_time()


def table(results: dict) -> Table:
    found = Table(title="Relative L2 error on the 256 x 101 grid")
    for column in ("problem", "seen", "seeds", "median", "best", "worst", "CPU s"):
        found.add_column(column)
    for name, runs in results.items():
        errors, seconds = [run["error"] for run in runs], [run["seconds"] for run in runs]
        problem = PROBLEMS[name]
        found.add_row(
            problem.title,
            "yes" if problem.seen else "no",
            str(len(runs)),
            *(f"{value:.1e}" for value in (statistics.median(errors), min(errors), max(errors))),
            f"{statistics.median(seconds):.0f}",
        )
    return found


def draw(results: dict, path: Path) -> None:
    """The references (above), and the error beside the CPU seconds of each run (below)."""
    figure, rows = plt.subplots(2, len(results), figsize=(3.4 * len(results), 6), layout="constrained", squeeze=False)
    for axis, below, (name, runs) in zip(*rows, results.items(), strict=True):
        problem = PROBLEMS[name]
        shown = problem.reference().reshape(-1, NT)
        extent = (problem.low[1], problem.high[1], problem.low[0], problem.high[0])
        image = axis.imshow(shown, origin="lower", aspect="auto", extent=extent, cmap="viridis")
        figure.colorbar(image, ax=axis)
        axis.set(title=problem.title, xlabel="t" if problem.name != "helmholtz" else "y", ylabel="x")
        for run in runs:
            seconds, _, errors = zip(*run["curve"], strict=True)
            below.semilogy(seconds, errors, ".-", label=f"seed {run['seed']}")
        below.set(xlabel="CPU s", ylabel="relative L2 error")
        below.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half an hour on one core",
        writes="standard.json, standard.md, standard.png",
        folder=command_line.RESULTS / "pde",
        quick="a tiny recipe: to see it run",
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--references", action="store_true", help="print the errors of the references, and stop")
    args = parser.parse_args()
    console = Console(width=140)
    if args.references:
        for name in args.problems:
            console.print(f"{name}: reference error {PROBLEMS[name].reference_error():.1e}")
        return
    recipe = QUICK if args.quick else Recipe()
    stem = args.output / ("standard_quick" if args.quick else "standard")
    results: dict[str, list] = {}
    if stem.with_suffix(".json").exists() and not args.quick:
        before = json.loads(stem.with_suffix(".json").read_text())
        results = before["results"] if before["recipe"] == asdict(recipe) else {}
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for name in args.problems:
            if any(run["seed"] == seed for run in results.get(name, [])):
                continue
            run = Run(PROBLEMS[name], recipe, seed, console)
            run.train()
            seconds, steps, error = run.curve[-1]
            results.setdefault(name, []).append(
                {"seed": seed, "error": error, "seconds": seconds, "steps": steps, "curve": run.curve}
                | {"parameters": sum(p.numel() for p in run.kan.parameters())}
            )
            record = {"recipe": asdict(recipe), "grid": [NX, NT], "results": results}
            stem.with_suffix(".json").write_text(json.dumps(record) + "\n")
    console.print(table(results))
    with stem.with_suffix(".md").open("w") as file:
        Console(file=file, width=100).print(table(results))
    draw(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
