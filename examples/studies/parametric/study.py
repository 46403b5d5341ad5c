# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family of adapters that knows its parameter: errors at unseen parameters beside the milliseconds that they take.

    python examples/studies/parametric/study.py --problem elliptic --seeds 0
    python examples/studies/parametric/study.py --quick                # for CI: says nothing

Beside predictions without training and after one step there are the nearest member and members fitted at the unseen
parameters themselves; for the seeds of `--rivals` also as many members on a uniform grid, nine adapters of which all
components are trained (`free`), linearly interpolated, one KAN with the parameter as further inputs, trained for as
long as the family, and families of fewer members, chosen greedily and on a grid. Seconds are CPU time. What took long
is kept in `--kept`, with which a run that was broken off goes on.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from peft import get_peft_model
from problems.parametric import PROBLEMS, Parameter, Problem, as_parameter, as_tuple, family_of
from scipy.stats import spearmanr
from study_tools import files
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, ParametricAdapter
from peft_lotra.kan import KAN
from peft_lotra.optim import LevenbergMarquardt


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)

METHODS = ("nearest", "free", "third_input", "uniform", "predicted", "one_step", "fitted")
LABELS = {
    "nearest": "nearest member",
    "third_input": "parameter as an input",
    "free": "free adapters, linear",
}
TITLES = {
    "burgers": "Burgers, viscosity 0.02 to 0.06",
    "burgers_two": "Burgers, viscosity and amplitude",
    "elliptic": "elliptic, contrast 0.2 to 1",
}
CHOICES = (("C0o-", "greedy", "chosen where predictions are worst"), ("C7s:", "uniform", "uniform grid"))
MEMBERS = (4, 8, 12, 16, 24, 32)  # of the families that show how many it takes


class ThirdInput(KAN):
    """A KAN of (x, c), with each parameter brought to [-1, 1]."""

    takes_parameter = True
    bounds = torch.tensor([[0.0], [1.0]])

    def scaled(self, c: Tensor) -> Tensor:
        low, high = self.bounds
        return (2 * c - low - high) / (high - low)

    def at(self, c: Parameter) -> Callable[[Tensor], Tensor]:
        """The network of x alone."""
        point = self.scaled(self.bounds.new_tensor([as_tuple(c)]))
        return lambda x: self(torch.cat([x, point.expand(len(x), -1)], dim=1))


def train_third_input(problem: Problem, points: int, seed: int, seconds: float) -> ThirdInput:
    """Train one network for all parameters, for as many CPU seconds as the family took."""
    torch.manual_seed(seed)
    dim = len(problem.low)
    model = ThirdInput([2 + dim, 10, 10, 1], 8, dtype=torch.float64)
    model.bounds = torch.tensor([problem.low, problem.high], dtype=torch.float64)
    ((residual, (x, _)),) = problem.terms_of(as_parameter(problem.base), 2 * points, seed)
    share = torch.rand(len(x), dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = model.bounds[0] + share * (model.bounds[1] - model.bounds[0])
    optimizer, start = LevenbergMarquardt(model, floor=1e-6), time.process_time()
    while time.process_time() - start < seconds and optimizer.step([(residual, (x, c))]).accepted:
        pass
    return model


class FreeAdapters:
    """Adapters of which all components are trained, and the base with the linear interpolation of two updates."""

    def __init__(self, base: KAN, problem: Problem, points: int, seed: int, count: int) -> None:
        self.base, self.known = base, {}
        for c in problem.spaced(count):
            torch.manual_seed(seed)
            model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=8))
            LevenbergMarquardt(model, floor=1e-6).fit(problem.terms_of(c, points, seed), 10, progress=False)
            self.known[c] = model.merge_and_unload().state_dict()

    def at(self, c: float) -> nn.Module:
        below = max((known for known in self.known if known <= c), default=min(self.known))
        above = min((known for known in self.known if known >= c), default=max(self.known))
        share = (c - below) / (above - below) if above > below else 0.0
        model = copy.deepcopy(self.base)
        model.load_state_dict({n: v.lerp(self.known[above][n], share) for n, v in self.known[below].items()})
        return model


def kept(path: Path, make: Callable[[], Any]) -> tuple[Any, float]:
    """What a function makes, and the CPU seconds that it took; from a file if an earlier run has made it."""
    if not path.exists():
        start = time.process_time()
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((made, time.process_time() - start), path)
    return torch.load(path, weights_only=False)


def fitted(base: KAN, problem: Problem, points: int, seed: int, **how: Any) -> ParametricAdapter:
    family = family_of(base, problem.name, points, seed)
    family.fit(**how, progress=False)
    return family


def errors_at(problem: Problem, c: Parameter, family: ParametricAdapter) -> dict:
    """The errors at one unseen parameter, and the CPU milliseconds that an adapter takes."""
    low, high = np.array(problem.low), np.array(problem.high)
    known = np.array([as_tuple(parameter) for parameter in family.parameters])
    nearest = as_parameter(known[np.abs((known - np.array(as_tuple(c))) / (high - low)).sum(1).argmin()].tolist())
    begin = time.process_time()
    prediction = family.predict(c)
    between = time.process_time()
    one = family.refine(c)
    after = time.process_time()
    there = family.refine(c, 8)
    seconds = {"predicted": between - begin, "one_step": after - between, "fitted": time.process_time() - after}
    evaluated = {"nearest": family.predict(nearest), "predicted": prediction, "one_step": one, "fitted": there}
    return {
        "c": c,
        "errors": {name: problem.error(evaluate, c) for name, evaluate in evaluated.items()},
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
    }


def run(
    problem: Problem, seed: int, members: int, points: int, unseen: int, steps: int, rivals: bool, folder: Path
) -> dict:
    """One family, and the errors of all methods at unseen parameters."""
    folder = folder / f"{problem.name}_{seed}"
    base, _ = kept(folder / "base.pt", lambda: problem.pretrained(seed, points * 5 // 3, steps))

    def make(name: str, **how: Any) -> tuple[ParametricAdapter, float]:
        return kept(folder / f"{name}.pt", lambda: fitted(base, problem, points, seed, **how))

    between: dict[str, Any] = {"between": (as_parameter(problem.low), as_parameter(problem.high))}
    family, offline = make("family", **between, max_members=members)
    count = len(family.parameters)
    others: dict[str, Any] = {}
    if rivals:
        others["uniform"], _ = make(f"uniform_{count}", parameters=problem.spaced(count))
        others["third_input"], _ = kept(
            folder / "third_input.pt", lambda: train_third_input(problem, points, seed, offline)
        )
    if rivals and len(problem.low) == 1:
        others["free"], _ = kept(folder / "free.pt", lambda: FreeAdapters(base, problem, points, seed, 9))
    draws = np.random.default_rng(seed).uniform(problem.low, problem.high, (unseen, len(problem.low))).tolist()
    rows = [
        kept(folder / f"row_{index}.pt", partial(errors_at, problem, as_parameter(c), family))[0]
        for index, c in enumerate(draws)
    ]
    for row in rows:
        at = {name: other.predict if name == "uniform" else other.at for name, other in others.items()}
        row["errors"] |= {name: problem.error(of(row["c"]), row["c"]) for name, of in at.items()}
        start = time.process_time()
        row["indicator"] = family.predict(row["c"]).indicator
        row["milliseconds"]["indicator"] = 1e3 * (time.process_time() - start)
    errors = {name: np.array([row["errors"][name] for row in rows]) for name in METHODS if name in rows[0]["errors"]}
    smaller: dict[str, dict[int, float]] = {"greedy": {}, "uniform": {}}
    for number in (number for number in MEMBERS if rivals and number < count):
        greedy = make(f"greedy_{number}", **between, max_members=number)[0]
        grid = make(f"uniform_{number}", parameters=problem.spaced(number))[0]
        for kind, few in (("greedy", greedy), ("uniform", grid)):
            found = [problem.error(few.predict(row["c"]), row["c"]) for row in rows]
            smaller[kind][len(few.parameters)] = float(np.median(found))
    if rivals:
        smaller["greedy"][count] = float(np.median(errors["predicted"]))
        smaller["uniform"][len(others["uniform"].parameters)] = float(np.median(errors["uniform"]))
    with tempfile.TemporaryDirectory() as place:
        family.save_pretrained(place)
        size = sum(path.stat().st_size for path in Path(place).glob("*.safetensors"))
    return {
        "problem": problem.name,
        "seed": seed,
        "base_error": problem.error(base, as_parameter(problem.base)),
        "members": count,
        "coordinates": family.size,
        "bytes_of_a_member": 8 * count,
        "bytes_of_the_file": size,
        "offline_seconds": offline,
        "medians": {name: float(np.median(values)) for name, values in errors.items()},
        "worst": {name: float(values.max()) for name, values in errors.items()},
        "ratios": {n: np.quantile(v / errors["fitted"], [0.5, 1.0]).tolist() for n, v in errors.items()},
        "medians_by_members": smaller,
        "rank_correlation": float(spearmanr(errors["predicted"], [row["indicator"] for row in rows])[0]),
        "rows": rows,
    }


def table(results: list[dict]) -> str:
    """The errors as shares of those of members fitted there, in Markdown, and their medians over the seeds."""
    names = ("predicted", "one_step", "nearest", "uniform", "free", "third_input")
    titles = ["predicted", "one step", *(LABELS.get(name, "uniform grid") for name in names[2:])]
    lines = [
        "Relative L2 errors at unseen parameters as shares of those of members fitted there (median, worst).\n",
        f"| problem, seed | members | CPU s | fitted there | {' | '.join(titles)} | rank correlation "
        "| indicator / error |",
        "|---|" + "--:|" * (5 + len(names)),
    ]

    def line(title: str, found: list[dict]) -> str:
        median = lambda of: statistics.median(map(of, found))  # noqa: E731
        shares = []
        for name in names:
            known = [result["ratios"][name] for result in found if name in result["ratios"]]
            middle = [statistics.median(values) for values in zip(*known, strict=True)]
            shares.append(f"{middle[0]:.2f}, {middle[1]:.2g}" if middle else "")
        estimate = median(
            lambda r: statistics.median(row["indicator"] / row["errors"]["predicted"] for row in r["rows"])
        )
        return (
            f"| {title} | {median(lambda r: r['members']):g} | {median(lambda r: r['offline_seconds']):.0f} "
            f"| {median(lambda r: r['medians']['fitted']):.1e} | {' | '.join(shares)} "
            f"| {median(lambda r: r['rank_correlation']):.2f} | {estimate:.2f} |"
        )

    for name in sorted({result["problem"] for result in results}):
        found = [result for result in results if result["problem"] == name]
        lines += [line(f"{name}, {result['seed']}", [result]) for result in found]
        if len(found) > 1:
            lines.append(line(f"{name}, median of {len(found)} seeds", found))
    machines = sorted({result["machine"].rpartition(", load ")[0] for result in results})
    return "\n".join([*lines, "", *(f"Machine: {text}, shared with others." for text in machines)]) + "\n"


def draw(results: list[dict], path: Path) -> None:
    """Error against online milliseconds, number of members against error, and indicator against error."""
    names = sorted({result["problem"] for result in results})
    columns = 2 + any(result["medians_by_members"]["greedy"] for result in results)
    size = (5.4 * columns, 5 * len(names))
    figure, axes = plt.subplots(len(names), columns, figsize=size, layout="constrained", squeeze=False)
    for (left, *middles, right), name in zip(axes, names, strict=True):
        found = [result for result in results if result["problem"] == name]
        rows = [row for result in found for row in result["rows"]]
        here = f"{TITLES[name]}: error by time"
        for color, (marker, kind, label) in enumerate(
            [
                ("o", "predicted", "predicted, no training"),
                ("s", "one_step", "one LM step from there"),
                ("^", "fitted", "eight steps"),
            ]
        ):
            points = np.array([(max(row["milliseconds"][kind], 0.5), row["errors"][kind]) for row in rows])
            left.loglog(*points.T, marker, color=f"C{color}", alpha=0.35, ms=3)
            left.loglog(
                *np.median(points, axis=0), marker, color=f"C{color}", mec="k", ms=10, label=f"{label}: median"
            )
        for color, (style, kind) in enumerate((("--", "nearest"), (":", "free"), ("-.", "third_input")), start=3):
            values = [row["errors"][kind] for row in rows if kind in row["errors"]]
            if values:
                left.axhline(float(np.median(values)), color=f"C{color}", lw=1.5, ls=style, label=LABELS[kind])
        left.set(title=here, xlabel="CPU ms from a new parameter to its adapter", ylabel="relative L2 error")
        for middle in middles:
            for result, (style, kind, label) in product(found, CHOICES):
                few = sorted((int(number), value) for number, value in result["medians_by_members"][kind].items())
                middle.loglog(*np.array(few).reshape(-1, 2).T, style, lw=1, ms=4, label=label)
            there = float(np.median([row["errors"]["fitted"] for row in rows]))
            middle.axhline(there, color="C2", lw=1.5, ls="--", label="fitted there (eight steps)")
            middle.set(title="error by number of members", xlabel="members", ylabel="median error of predictions")
            middle.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
            middle.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
        for marker, result in zip(cycle("os^Dv"), found, strict=False):
            points = [(row["indicator"], row["errors"]["predicted"]) for row in result["rows"]]
            label = f"seed {result['seed']}: rank correlation {result['rank_correlation']:.2f}"
            right.loglog(*zip(*points, strict=True), marker, ms=4, label=label)
        ends = [min(right.get_xlim()[0], right.get_ylim()[0]), max(right.get_xlim()[1], right.get_ylim()[1])]
        right.plot(ends, ends, color="0.7", lw=1, label="equal")
        right.xaxis.set_minor_formatter("")
        right.set(title="estimated and true error", xlabel="estimated error of a prediction", ylabel="true error")
        for axis in (left, *middles, right):
            handles, labels = axis.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            axis.legend(
                unique.values(), unique.keys(), fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2
            )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about four minutes of one core for each problem and seed",
        writes="PROBLEM_SEED.json, study.md, errors.png",
        folder=command_line.RESULTS / "parametric",
        quick="a tiny setting, to see that it runs",
        redraw=True,
    )
    parser.add_argument("--problem", choices=list(PROBLEMS), nargs="+", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rivals", type=int, nargs="*", default=[0], help="seeds with all other methods, which take long"
    )
    parser.add_argument("--members", type=int, default=64, help="the most members (default: that of the package)")
    parser.add_argument("--kept", type=Path, help="a folder for what took long (default: none is kept)")
    args = parser.parse_args()
    prefix = "quick_" if args.quick else ""
    with tempfile.TemporaryDirectory() as place:
        for name in () if args.redraw else args.problem:
            for seed in args.seeds[:1] if args.quick else args.seeds:
                sizes = (10, 200, 3, 4) if args.quick else (args.members, 1500, 20, 45)
                rivals = seed in args.rivals
                result = run(PROBLEMS[name], seed, *sizes, rivals, args.kept or Path(place))
                files.write(args.output / f"{prefix}{name}_{seed}.json", result)
                print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1), flush=True)
    pattern = "quick_*_*.json" if args.quick else "[!q]*_[0-9].json"
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob(pattern))]
    (args.output / f"{prefix}study.md").write_text(table(results))
    draw(results, args.output / f"{prefix}errors.png")


if __name__ == "__main__":
    main()
