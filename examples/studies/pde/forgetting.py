# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Ten problems by Levenberg-Marquardt on points drawn anew for each step: fixed forgetting factors beside "auto".

Shown in docs/training.md.

python examples/studies/pde/forgetting.py                            # 60 runs, about 7 s of one core each
python examples/studies/pde/forgetting.py --problems wave --seeds 1 --factors 0.8 auto
python examples/studies/pde/forgetting.py --quick                    # tiny, to see it run

The standard problems at a parameter that needs no continuation, a wave, a layer, and Poisson's equation in five
dimensions. The rule of "auto" was chosen on Burgers, Helmholtz, Korteweg-de Vries, the wave and advection.
Runs that are in forgetting.json are not repeated.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import math
import statistics
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import torch
from problems.recipe import QUICK, Collocation, Recipe, constrained, new_network
from problems.standard import PROBLEMS, START, UNIT, WALLS, Problem, axes_of
from study_tools.records import Record
from study_tools.tables import table
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import BoxDistance, ResidualSampler, box_points
from peft_lotra.pde.features import BoxFeatures


torch.set_num_threads(1)

FACTORS = ("0", "0.3", "0.5", "0.8", "0.95", "auto")
RECIPE = replace(Recipe(), width=6, grid_size=6, steps=60, points=600)


# u_tt = 4 u_xx, u = 0 at x = 0 and 1, u_t(x, 0) = 0


def wave(model: nn.Module, x: Tensor, _: float) -> Tensor:
    return jet(model, x, collapse=(-4.0, 1.0))[2]


def exact_wave(_: int, __: float) -> np.ndarray:
    x, t = axes_of(*UNIT)
    waves = [np.sin(k * math.pi * x)[:, None] * np.cos(2 * k * math.pi * t) for k in (1, 4)]
    return waves[0] + waves[1] / 2


# -e (u_xx + u_yy) + u_x = f, u = 0 on the boundary; a layer of width e at x = 1


def _profile(x, e: float, exp):
    return x - (exp((x - 1) / e) - math.exp(-1 / e)) / (1 - math.exp(-1 / e))


def layer(model: nn.Module, x: Tensor, e: float) -> Tensor:
    _, slopes, laplacian = jet(model, x, collapse=True)
    force = (1 + e * math.pi**2 * _profile(x[:, :1], e, torch.exp)) * torch.sin(math.pi * x[:, 1:])
    return slopes[0] - e * laplacian - force


def exact_layer(_: int, e: float) -> np.ndarray:
    x, y = axes_of(*UNIT)
    return _profile(x, e, np.exp)[:, None] * np.sin(math.pi * y)


# u_11 + ... + u_55 = f in [-1, 1]^5, u = 0 on the boundary


def _product(x: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * x).prod(-1, keepdim=True)


def poisson(model: nn.Module, x: Tensor, _: float) -> Tensor:
    return jet(model, x, collapse=True)[2] + 5 * math.pi**2 / 4 * _product(x)


class Cube(Problem):
    def points(self) -> Tensor:
        return box_points(self.low, self.high, 10_000, seed=0)

    def reference(self) -> Tensor:
        return _product(self.points())


def _zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x[..., :1])


def _at_rest(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., :1]) + torch.sin(4 * math.pi * x[..., :1]) / 2


def _new(
    kind: type[Problem], name: str, box: tuple, parameter: float, residual, solve, sides=None, twice=(), lift=_zero
):
    distance = BoxDistance(*box, sides, twice=twice)
    features = BoxFeatures(*box)
    return kind(name, name, *box, parameter, parameter, residual, distance, lift, solve, 1, features)


EASY = {"burgers": 0.02, "allen_cahn": 0.01, "helmholtz": 4.0, "korteweg_de_vries": 0.05}
EASY |= {"sine_gordon": 5.0, "advection": 5.0, "fisher": 2.0}
CUBE = ((-1.0,) * 5, (1.0,) * 5)
TEN = {name: replace(PROBLEMS[name], start=value, stop=value) for name, value in EASY.items()} | {
    "wave": _new(Problem, "wave", UNIT, 1.0, wave, exact_wave, [*WALLS, START], [START], _at_rest),
    "layer": _new(Problem, "layer", UNIT, 0.05, layer, exact_layer),
    "poisson": _new(Cube, "poisson", CUBE, 1.0, poisson, None),
}
CHOSEN_ON = ("burgers", "helmholtz", "korteweg_de_vries", "wave", "advection")


def run(problem: Problem, recipe: Recipe, factor: str, seed: int) -> dict:
    """The error every ten steps, and the loss."""
    torch.manual_seed(seed)
    if len(problem.low) > 2:
        recipe = replace(recipe, grid_size=3)
    network = new_network(problem, recipe)
    model = constrained(problem, network)
    sampler = ResidualSampler(problem.low, problem.high, recipe.points, seed=1000 * seed)
    points = Collocation(problem, problem.stop, model, sampler, recipe.slope_scale)
    forgetting = factor if factor == "auto" else float(factor)
    optimizer = LevenbergMarquardt(model, floor=1e-6, forgetting=forgetting, memory=2**32)
    curve = []
    for step in range(recipe.steps):
        record = optimizer.step(points.terms())
        optimizer.damping = min(optimizer.damping, 1e3)
        if step % 10 == 9:
            curve.append((step + 1, problem.error(model), record.loss))
    return {"seed": seed, "error": problem.error(model), "curve": curve}


def errors(results: dict, name: str, seed: int) -> dict[str, float]:
    """The error by factor."""
    found = {factor: {run["seed"]: run["error"] for run in runs} for factor, runs in results.get(name, {}).items()}
    return {factor: found[factor][seed] for factor in FACTORS if seed in found.get(factor, {})}


def markdown(record: dict) -> str:
    """A table of the first seed; of the second one, on which only the factors that were best were run, the ratios."""
    results = record["results"]
    found = {name: errors(results, name, 1) for name in TEN}
    found = {name: each for name, each in found.items() if len(each) == len(FACTORS)}
    if not found:
        return ""
    again = {name: errors(results, name, 2) for name in found}
    again = {name: each.pop("auto") / min(each.values()) for name, each in again.items() if "auto" in each}
    best = {name: min(value for factor, value in each.items() if factor != "auto") for name, each in found.items()}
    ratios = {factor: [each[factor] / best[name] for name, each in found.items()] for factor in FACTORS}
    mean = statistics.geometric_mean
    text = (
        f'`forgetting="auto"` has {min(ratios["auto"]):.2f} to {max(ratios["auto"]):.2f} times the error of the best '
        f"fixed factor, {mean(ratios['auto']):.2f} times in the geometric mean. Relative L2 errors after "
        f"{RECIPE.steps} steps of {RECIPE.points} points drawn anew; in bold the best fixed factor, with a star the "
        "problems that the rule was chosen on; on the right the ratio on seed 2, by 0, 0.3 and auto alone."
    )
    lines = []
    for name, each in found.items():
        shown = [f"**{each[f]:.1e}**" if f != "auto" and each[f] == best[name] else f"{each[f]:.1e}" for f in FACTORS]
        title = name.replace("_", " ") + " *" * (name in CHOSEN_ON)
        second = f"{again[name]:.2f}" if name in again else ""
        lines.append([title, *shown, f"{each['auto'] / best[name]:.2f}", second])
    for title, of in (("geometric mean of the ratios to the best", mean), ("largest of them", max)):
        lines.append([title, *(f"{of(ratios[f]):.2f}" for f in FACTORS), "", ""])
    header = f"| problem | {' | '.join(FACTORS)} | auto / best | seed 2 |"
    return f"{text}\n\n{table(header, lines)}"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="10 minutes a seed on one core",
        writes="forgetting.json, forgetting.md",
        folder=command_line.RESULTS / "pde",
        quick="a tiny recipe: to see it run",
    )
    parser.add_choices("--problems", TEN)
    parser.add_choices("--factors", FACTORS)
    parser.add_seeds(1)
    args = parser.parse_args()
    recipe = replace(QUICK, steps=3) if args.quick else RECIPE
    record = Record.of(args, "forgetting", asdict(recipe))

    def measure(seed: int, name: str, factor: str) -> dict:
        return run(TEN[name], recipe, factor, seed)

    record.complete(product(args.seeds, args.problems, args.factors), measure)
    record.write_page(markdown)


if __name__ == "__main__":
    main()
