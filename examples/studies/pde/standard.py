# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The standard problems from scratch, by one recipe that is made of the building blocks of `peft_lotra.pde`.

python examples/studies/pde/standard.py                      # 35 runs, about a minute of one core each
python examples/studies/pde/standard.py --problems burgers --seeds 1
python examples/studies/pde/standard.py --peers              # jaxKAN (extra `peers`) for as many seconds as ours took
python examples/studies/pde/standard.py --references         # errors of the reference solutions
python examples/studies/pde/standard.py --quick              # tiny, to see it run

The recipe was made with seed 0 of Burgers, Allen-Cahn, Helmholtz, Korteweg-de Vries and sine-Gordon, and not changed
for advection and Fisher. Seeds 1 to 5 are what is reported. Runs with the same recipe that are in standard.json are
kept, and not repeated, so that several processes may share the work.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
        width, grid_size, spline_order: of the network [inputs, width, width, outputs], whose activations are bounded.
        stages: parameters of the continuation, in equal ratios.
        steps, most, target: Levenberg-Marquardt steps at each parameter, and the most that are taken until the loss is
            below `target` times the first one. A problem without continuation takes `stages` times `steps` at once.
        points, forgetting: collocation points, drawn anew for each step, and the factor by which Levenberg-Marquardt
            forgets former ones, during the continuation.
        settle, settle_points: steps after the continuation, and their points.
        last, last_points, refined: steps and points on grids of `refined` intervals.
        last_forgetting: the factor after the continuation.
        slope_scale: of `gradient_weights`.
    """

    width: int = 8
    grid_size: int = 8
    spline_order: int = 5
    stages: int = 6
    steps: int = 10
    most: int = 30
    target: float = 1e-4
    points: int = 1500
    forgetting: float = 0.3
    settle: int = 20
    settle_points: int = 2000
    last: int = 12
    last_points: int = 4000
    refined: int = 16
    last_forgetting: float = 0.8
    slope_scale: float = 0.1


QUICK = Recipe(width=3, grid_size=4, stages=2, steps=2, most=3, points=150, settle=2, settle_points=150, last=3)
QUICK = replace(QUICK, last_points=200, refined=8)


class Run:
    """One training; `curve` has the CPU seconds, the steps and the error after each stage."""

    def __init__(self, problem: Problem, recipe: Recipe, seed: int, console: Console) -> None:
        torch.manual_seed(seed)
        self.problem, self.recipe, self.seed, self.console = problem, recipe, seed, console
        widths = [problem.features.out_features, recipe.width, recipe.width, problem.outputs]
        self.kan = KAN(widths, recipe.grid_size, recipe.spline_order, norm="tanh", dtype=torch.float64)
        self.model = HardConstraint(nn.Sequential(problem.features, self.kan), problem.distance, problem.lift)
        self.sampler = ResidualSampler(problem.low, problem.high, recipe.points, seed=1000 * seed)
        self.optimizer = LevenbergMarquardt(self.model, floor=1e-6, forgetting=recipe.forgetting)
        self.parameter = self.first_loss = math.nan
        self.curve: list[tuple[float, int, float]] = []
        self.steps, self.seconds, self.clock = 0, 0.0, 0.0

    def train(self) -> None:
        recipe, problem = self.recipe, self.problem
        problem.reference()  # outside of the seconds
        self.clock = time.process_time()
        if problem.start != problem.stop:
            for stage in range(recipe.stages):
                if stage:
                    self.move_knots()
                share = stage / (recipe.stages - 1)
                self.fit(problem.start * (problem.stop / problem.start) ** share, recipe.steps, recipe.most)
        self.optimizer.forgetting = recipe.last_forgetting
        self.sampler.count = recipe.settle_points
        if problem.start == problem.stop:
            self.fit(problem.stop, recipe.stages * recipe.steps)
        self.fit(problem.stop, recipe.settle)
        self.sampler.count = recipe.last_points
        samples = problem.features(box_points(problem.low, problem.high, 2000, seed=self.seed))
        refine_grid(self.kan, recipe.refined, samples, exact=True)
        self.optimizer.forget()
        for _ in range(3):
            self.fit(problem.stop, recipe.last // 3)

    def move_knots(self) -> None:
        """Knots of the first layer where the solution is steep."""
        features = self.problem.features
        density = torch.ones(features.out_features, 64, dtype=torch.float64)
        of_coordinates = knot_density(self.model, self.problem.low, self.problem.high)
        for j, i in enumerate(features.sources.tolist()):
            if i not in features.periodic:
                density[j] = of_coordinates[i]
        refine_grid(self.kan, self.recipe.grid_size, density=density, tolerance=math.inf)

    def knots(self) -> KnotMap | None:
        """The map of the knots, if it is one of the box's coordinates."""
        first = self.kan.layers[0]
        return first if isinstance(first, KnotMap) and not self.problem.features.periodic else None

    def fit(self, parameter: float, steps: int, most: int = 0) -> None:
        problem, recipe = self.problem, self.recipe

        def residual(model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
            return weight * problem.residual(model, x, parameter)

        def weights(x: Tensor) -> Tensor:
            return gradient_weights(self.model, x, recipe.slope_scale)

        if parameter != self.parameter:
            self.optimizer.forget()  # residuals of another equation
            self.optimizer.damping = min(1e-2, 100 * self.optimizer.damping)
            self.parameter = parameter
        loss = math.inf
        for step in range(max(steps, most)):
            if step >= steps and loss < recipe.target * self.first_loss:
                break
            x, _ = self.sampler.draw(lambda x: residual(self.model, x, weights(x)), self.knots())
            record = self.optimizer.step([(residual, (x, weights(x))), *problem.terms()])
            self.optimizer.damping = min(self.optimizer.damping, 1e3)
            self.steps += 1
            loss = record.loss
            if math.isnan(self.first_loss):
                self.first_loss = loss / (1 - record.decrease)
        self.seconds += time.process_time() - self.clock
        error = problem.error(self.model)
        self.curve.append((self.seconds, self.steps, error))
        self.console.print(
            f"{problem.name} seed {self.seed}: parameter {parameter:.3g}, grid {self.kan.layers[-1].grid_size}, "
            f"loss {loss:.1e}, error {error:.2e} after {self.steps} steps, {self.seconds:.1f} CPU s"
        )
        self.clock = time.process_time()


def table(results: dict, peers: dict) -> Table:
    found = Table(title="Relative L2 error on the 256 x 101 grid")
    for column in ("problem", "method", "seen", "seeds", "median", "best", "worst", "CPU s"):
        found.add_column(column)
    for name in results:
        for method, runs in (("ours", results[name]), *peers.get(name, {}).items()):
            errors, seconds = [run["error"] for run in runs], [run["seconds"] for run in runs]
            problem = PROBLEMS[name]
            found.add_row(
                problem.title if method == "ours" else "",
                method if method == "ours" else f"jaxKAN {method}",
                "" if method != "ours" else "yes" if problem.seen else "no",
                str(len(runs)),
                *(f"{value:.1e}" for value in (statistics.median(errors), min(errors), max(errors))),
                f"{statistics.median(seconds):.0f}",
            )
    return found


def draw(results: dict, peers: dict, path: Path) -> None:
    """The references (above), and the error beside the CPU seconds of each run (below)."""
    figure, rows = plt.subplots(2, len(results), figsize=(3.4 * len(results), 6), layout="constrained", squeeze=False)
    for axis, below, (name, runs) in zip(*rows, results.items(), strict=True):
        problem = PROBLEMS[name]
        shown = problem.reference().reshape(-1, NT)
        extent = (problem.low[1], problem.high[1], problem.low[0], problem.high[0])
        image = axis.imshow(shown, origin="lower", aspect="auto", extent=extent, cmap="viridis")
        figure.colorbar(image, ax=axis)
        axis.set(title=problem.title, xlabel="t" if problem.name != "helmholtz" else "y", ylabel="x")
        lines = [("ours", "C0", "-", runs)]
        lines += [
            (f"jaxKAN {kind}", f"C{i + 1}", "--", found) for i, (kind, found) in enumerate(peers.get(name, {}).items())
        ]
        for label, color, style, found in lines:
            for run in found:
                seconds, _, errors = zip(*run["curve"], strict=True)
                below.semilogy(seconds, errors, "." + style, color=color, label=label if run is found[0] else None)
        below.set(xlabel="CPU s", ylabel="relative L2 error")
        below.grid(alpha=0.3)
        below.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


class Record:
    """standard.json: the runs of the recipe, and those of jaxKAN. Other processes may add to the file meanwhile."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe

    def read(self) -> dict:
        empty = {"recipe": asdict(self.recipe), "grid": [NX, NT], "results": {}, "peers": {}}
        if not self.path.exists():
            return empty
        before = json.loads(self.path.read_text())
        return {**empty, **before} if before["recipe"] == empty["recipe"] else empty

    def add(self, run: dict, *keys: str) -> None:
        """Adds a run to the list under these keys."""
        record = self.read()
        place: Any = record
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place.setdefault(keys[-1], []).append(run)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(record) + "\n")
        new.replace(self.path)

    def has(self, seed: int, *keys: str) -> bool:
        place: Any = self.read()
        for key in keys:
            place = place.get(key, {})
        return any(run["seed"] == seed for run in place)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half an hour on one core",
        writes="standard.json, standard.md, standard.png",
        folder=command_line.RESULTS / "pde",
        quick="a tiny recipe: to see it run",
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--references", action="store_true", help="print the errors of the references, and stop")
    parser.add_argument("--peers", action="store_true", help="run jaxKAN for the median seconds of our runs")
    parser.add_argument("--peers-to-the-end", metavar="PROBLEM", help="run jaxKAN's splines for all of its epochs")
    args = parser.parse_args()
    console = Console(width=140)
    if args.references:
        for name in args.problems:
            console.print(f"{name}: reference error {PROBLEMS[name].reference_error():.1e}")
        return
    recipe = QUICK if args.quick else Recipe()
    stem = args.output / ("standard_quick" if args.quick else "standard")
    record = Record(stem.with_suffix(".json"), recipe)
    if args.quick:
        record.path.unlink(missing_ok=True)
    if args.peers or args.peers_to_the_end:
        run_peers(args, record, console)
    else:
        for seed in args.seeds[:1] if args.quick else args.seeds:
            for name in args.problems:
                if record.has(seed, "results", name):
                    continue
                run = Run(PROBLEMS[name], recipe, seed, console)
                run.train()
                seconds, steps, error = run.curve[-1]
                record.add(
                    {"seed": seed, "error": error, "seconds": seconds, "steps": steps, "curve": run.curve}
                    | {"parameters": sum(p.numel() for p in run.kan.parameters())},
                    *("results", name),
                )
    found = record.read()
    results = {name: found["results"][name] for name in PROBLEMS if name in found["results"]}
    console.print(table(results, found["peers"]))
    with stem.with_suffix(".md").open("w") as file:
        Console(file=file, width=110).print(table(results, found["peers"]))
    draw(results, found["peers"], stem.with_suffix(".png"))


def run_peers(args: argparse.Namespace, record: Record, console: Console) -> None:
    """jaxKAN on the problems whose residuals it has, for as many seconds as ours; or its splines for all epochs."""
    from problems.peers import EPOCHS, LAYERS, RESIDUALS, train

    if args.peers_to_the_end:
        run = train(args.peers_to_the_end, "spline", args.seeds[0], math.inf, console.print, EPOCHS)
        record.add(run, "peers", args.peers_to_the_end, f"spline, {EPOCHS} epochs")
        return
    for seed in args.seeds:
        for name in [name for name in args.problems if name in RESIDUALS]:
            if not (ours := record.read()["results"].get(name)):
                raise SystemExit(f"There is no run of {name} in {record.path}: run the study without --peers first.")
            seconds = statistics.median(run["seconds"] for run in ours)
            for kind in LAYERS:
                if not record.has(seed, "peers", name, kind):
                    record.add(train(name, kind, seed, seconds, console.print), "peers", name, kind)


if __name__ == "__main__":
    main()
