# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family of adapters that knows its parameter: errors at unseen parameters beside the milliseconds that they take.

    python examples/studies/parametric/study.py --problem elliptic     # some minutes of one core for each seed
    python examples/studies/parametric/study.py --quick                # for CI: says nothing

Beside predictions without training and after one step there are the nearest member, as many members on a uniform grid,
members fitted at the unseen parameters themselves, and one KAN with the parameter as its third input, trained for as
long as the family. Seconds are CPU time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from equations import PROBLEMS, Problem, terms_of
from scipy.stats import spearmanr

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN
from peft_lotra.optim import LevenbergMarquardt


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)

METHODS = ("nearest", "uniform", "third_input", "predicted", "one_step", "fitted")


class ThirdInput(KAN):
    """A KAN of (x, c), with c brought to [-1, 1]."""

    takes_parameter = True
    low, high = 0.0, 1.0

    def scaled(self, c: torch.Tensor) -> torch.Tensor:
        return (2 * c - self.low - self.high) / (self.high - self.low)

    def at(self, c: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network of x alone."""
        return lambda x: self(torch.cat([x, self.scaled(torch.full_like(x[:, :1], c))], dim=1))


def train_third_input(problem: Problem, points: int, seed: int, seconds: float) -> ThirdInput:
    """Trains one network for all parameters, for as many CPU seconds as the family took."""
    torch.manual_seed(seed)
    model = ThirdInput([3, 10, 10, 1], 8, dtype=torch.float64)
    model.low, model.high = problem.low, problem.high
    ((residual, (x, _)),) = problem.terms_of(problem.base, 2 * points, seed)
    share = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = problem.low + share * (problem.high - problem.low)
    optimizer, start = LevenbergMarquardt(model, floor=1e-6), time.process_time()
    while time.process_time() - start < seconds and optimizer.step([(residual, (x, c))]).accepted:
        pass
    return model


def run(problem: Problem, seed: int, members: int, points: int, unseen: int, steps: int) -> dict:
    """One family, and the errors of all methods at unseen parameters."""
    base = problem.pretrained(seed, points * 5 // 3, steps)
    arguments = {"ranks": 8, "log": problem.name == "burgers"}
    family, uniform = (ParametricAdapter(base, terms_of(problem.name, points, seed), **arguments) for _ in range(2))
    start = time.process_time()
    family.fit(between=(problem.low, problem.high), max_members=members, progress=False)
    offline = time.process_time() - start
    count = len(family.parameters)
    spaced = np.geomspace if arguments["log"] else np.linspace
    uniform.fit(spaced(problem.low, problem.high, count).tolist(), progress=False)
    third = train_third_input(problem, points, seed, offline)
    rows = []
    for c in np.random.default_rng(seed).uniform(problem.low, problem.high, unseen).tolist():
        nearest = min(family.parameters, key=lambda known: abs(known - c))
        begin = time.process_time()
        prediction = family.predict(c)
        between = time.process_time()
        one = family.refine(c)
        end = time.process_time()
        errors = {
            "nearest": problem.error(family.predict(nearest), c),
            "uniform": problem.error(uniform.predict(c, force=True), c),
            "third_input": problem.error(third.at(c), c),
            "predicted": problem.error(prediction, c),
            "one_step": problem.error(one, c),
            "fitted": problem.error(family.refine(c, 8), c),
        }
        milliseconds = {"predicted": 1e3 * (between - begin), "one_step": 1e3 * (end - between)}
        rows.append({"c": c, "indicator": prediction.indicator, "errors": errors, "milliseconds": milliseconds})
    with tempfile.TemporaryDirectory() as folder:
        family.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    errors = {name: np.array([row["errors"][name] for row in rows]) for name in METHODS}
    correlation = spearmanr(errors["predicted"], [row["indicator"] for row in rows])[0]
    return {
        "problem": problem.name,
        "seed": seed,
        "base_error": problem.error(base, problem.base),
        "members": count,
        "coordinates": family.size,
        "bytes_of_a_member": 8 * count,
        "bytes_of_the_file": size,
        "offline_seconds": offline,
        "medians": {name: float(np.median(values)) for name, values in errors.items()},
        "ratios": {n: np.quantile(errors[n] / errors["fitted"], [0.5, 1.0]).tolist() for n in METHODS[:-1]},
        "rank_correlation": float(correlation),
        "rows": rows,
    }


def draw(results: list[dict], path: Path) -> None:
    """Error against online milliseconds; without training, and after one step."""
    names = sorted({result["problem"] for result in results})
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        rows = [row for result in results if result["problem"] == name for row in result["rows"]]
        for kind, label in (("predicted", "predicted, no training"), ("one_step", "one step from there")):
            points = [(max(row["milliseconds"][kind], 0.5), row["errors"][kind]) for row in rows]
            ax.loglog(*zip(*points, strict=True), ".", label=label)
        for color, kind in enumerate(("fitted", "nearest", "third_input"), start=2):
            level = np.median([row["errors"][kind] for row in rows])
            ax.axhline(level, color=f"C{color}", lw=1, ls="--", label=f"{kind.replace('_', ' ')}, median")
        ax.set(title=name, xlabel="online milliseconds (CPU)", ylabel="relative L2 error")
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=list(PROBLEMS), nargs="+", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "parametric")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.problem:
        for seed in args.seeds[:1] if args.quick else args.seeds:
            sizes = (10, 200, 3, 4) if args.quick else (args.members, 1500, 20, 45)
            result = run(PROBLEMS[name], seed, *sizes)
            prefix = "quick_" if args.quick else ""
            (args.output / f"{prefix}{name}_{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1), flush=True)
    pattern = "quick_*_*.json" if args.quick else "[!q]*_[0-9].json"
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob(pattern))]
    draw(results, args.output / ("quick_errors.png" if args.quick else "errors.png"))


if __name__ == "__main__":
    main()
