# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The standard problems from scratch, by one recipe that is made of the building blocks of `peft_lotra.pde`.

python examples/studies/pde/standard.py                      # 35 runs, about a minute of one core each
python examples/studies/pde/standard.py --problems burgers --seeds 1
python examples/studies/pde/standard.py --mlp                # a tanh MLP by the same recipe and steps
python examples/studies/pde/standard.py --peers              # jaxKAN (extra `peers`) for as many seconds as ours took
python examples/studies/pde/standard.py --references         # errors of the reference solutions
python examples/studies/pde/standard.py --quick              # tiny, to see it run

`solve` is that recipe as one call, with newer choices of the network, of the factor of forgetting and of the last
parameters; ten.py runs it. The recipe was made with seed 0 of Burgers, Allen-Cahn, Helmholtz, Korteweg-de Vries and
sine-Gordon, and not changed for advection and Fisher. Seeds 1 to 5 are what is reported. Runs of the same recipe that
are in standard.json are kept, and not repeated, so that several processes may share the work.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import argparse
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from problems.recipe import QUICK, Recipe, Run
from problems.records import Record
from problems.standard import NT, NX, PROBLEMS
from rich.console import Console
from rich.table import Table
from study_tools import pictures


torch.set_num_threads(1)


MLP = "mlp"
LABELS = {"ours": "KAN", MLP: "tanh MLP 3 x 25"}


def label_of(method: str) -> str:
    """What tables and pictures call a method."""
    return LABELS.get(method, f"jaxKAN {method}")


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
                label_of(method),
                "" if method != "ours" else "yes" if problem.seen else "no",
                str(len(runs)),
                *(f"{value:.1e}" for value in (statistics.median(errors), min(errors), max(errors))),
                f"{statistics.median(seconds):.0f}",
            )
    return found


def draw(results: dict, peers: dict, path: Path) -> None:
    """The reference of each problem, and below it the error beside the CPU seconds of each run."""
    columns = min(len(results), 4)
    blocks = -(-len(results) // columns)
    size = (2.9 * columns, 5 * blocks + 0.8)
    figure, grid = plt.subplots(2 * blocks, columns, figsize=size, layout="constrained", squeeze=False)
    places = [
        pair for above, below in zip(grid[::2], grid[1::2], strict=True) for pair in zip(above, below, strict=True)
    ]
    for axis, below in places[len(results) :]:
        axis.remove()
        below.remove()
    lines = {"KAN": pictures.STYLES[0]}
    for (axis, below), (name, runs) in zip(places, results.items(), strict=False):
        problem = PROBLEMS[name]
        extent = (problem.low[1], problem.high[1], problem.low[0], problem.high[0])
        pictures.field_bar(figure, pictures.draw_field(axis, problem.reference().reshape(-1, NT).T, extent), axis)
        axis.set(
            title=problem.title.replace(", ", "\n", 1), xlabel="t" if problem.name != "helmholtz" else "y", ylabel="x"
        )
        for method, found in {"ours": runs, **peers.get(name, {})}.items():
            label = label_of(method)
            style = lines.setdefault(label, pictures.STYLES[len(lines) % len(pictures.STYLES)]) | {
                "markersize": 3.5,
                "linewidth": 1,
            }
            for run in found:
                seconds, _, errors = zip(*run["curve"], strict=True)
                below.loglog(seconds, errors, **style, label=label if run is found[0] else None)
        below.set(xlabel="CPU s", ylabel="relative L2 error")
        below.xaxis.set_major_formatter("{x:g}")
        below.xaxis.set_minor_formatter("")
    known = {line.get_label(): line for _, below in places for line in below.get_lines() if line.get_label()[0] != "_"}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(known))
    figure.suptitle(
        "From zero by one recipe, five seeds: the solutions, and the errors that a minute brings them to\n"
        + pictures.FIELD_LINES
    )
    figure.savefig(path)
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
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--references", action="store_true", help="print the errors of the references, and stop")
    parser.add_argument("--mlp", action="store_true", help="run an MLP by the same recipe")
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
    empty = {"recipe": asdict(recipe), "grid": [NX, NT], "results": {}, "peers": {}}
    record = Record(stem.with_suffix(".json"), empty)
    if args.quick and not args.mlp:
        record.path.unlink(missing_ok=True)
    if args.peers or args.peers_to_the_end:
        run_peers(args, record, console)
    else:
        if args.mlp and (missing := [name for name in args.problems if name not in record.read()["results"]]):
            raise SystemExit(f"There is no run of {missing[0]} in {record.path}: run the study without options first.")
        for seed in args.seeds[:1] if args.quick else args.seeds:
            for name in args.problems:
                place = ("peers", name, MLP) if args.mlp else ("results", name)
                if record.has(seed, *place):
                    continue
                run = Run(PROBLEMS[name], recipe, seed, console, args.mlp)
                run.train()
                seconds, steps, error = run.curve[-1]
                record.add(
                    {"seed": seed, "error": error, "seconds": seconds, "steps": steps, "curve": run.curve}
                    | {"parameters": sum(p.numel() for p in run.network.parameters())},
                    *place,
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
