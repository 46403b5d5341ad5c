# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The standard problems from scratch, by one recipe that is made of the building blocks of `peft_lotra.pde`.

python examples/studies/pde/standard.py                      # 35 runs, about a minute of one core each
python examples/studies/pde/standard.py --problems burgers --seeds 1
python examples/studies/pde/standard.py --mlp                # a tanh MLP by the same recipe and steps
python examples/studies/pde/standard.py --peers              # jaxKAN (extra `peers`) for as many seconds as ours took
python examples/studies/pde/standard.py --references         # errors of all reference solutions, and of families
python examples/studies/pde/standard.py --quick              # tiny, to see it run

`solve` is that recipe as one call, with newer choices of the network, of the factor of forgetting and of the last
parameters; ten.py runs it. The recipe was made with seed 0 of Burgers, Allen-Cahn, Helmholtz, Korteweg-de Vries and
sine-Gordon, and not changed for advection and Fisher. Seeds 1 to 5 are what is reported. Runs of the same recipe that
are in standard.json are kept, and not repeated, so that several processes may share the work.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import argparse
import io
import math
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from problems.families import FAMILIES
from problems.families import axis as family_axis
from problems.recipe import QUICK, Recipe, Run
from problems.standard import NT, NX, PROBLEMS, cole_hopf
from rich.console import Console
from rich.table import Table
from study_tools import pictures
from study_tools.records import Record


torch.set_num_threads(1)


MLP = "mlp"
LABELS = {"ours": "KAN", MLP: "tanh MLP 3 x 25"}


def label_of(method: str) -> str:
    """What tables and pictures call a method."""
    return LABELS.get(method, f"jaxKAN {method}")


def finished(record: dict) -> dict[str, list[dict]]:
    """Return the runs of the KAN, in the order of the problems."""
    return {name: record["results"][name] for name in PROBLEMS if name in record["results"]}


def table(record: dict) -> Table:
    results, peers = finished(record), record["peers"]
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


def markdown(record: dict) -> str:
    """Return the table as text."""
    stream = io.StringIO()
    Console(file=stream, width=110).print(table(record))
    return stream.getvalue()


def draw(record: dict, path: Path) -> None:
    """The reference of each problem, and below it the error beside the CPU seconds of each run."""
    results, peers = finished(record), record["peers"]
    if not results:
        return
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
    figure.suptitle("Solutions, and their errors by time from scratch; five seeds of the KAN\n" + pictures.FIELD_LINES)
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
    parser.add_choices("--problems", PROBLEMS)
    parser.add_seeds(1, 2, 3, 4, 5)
    parser.add_argument("--references", action="store_true", help="print the errors of the references, and stop")
    parser.add_argument("--mlp", action="store_true", help="run an MLP by the same recipe")
    parser.add_argument("--peers", action="store_true", help="run jaxKAN for the median seconds of our runs")
    parser.add_argument("--peers-to-the-end", metavar="PROBLEM", help="run jaxKAN's splines for all of its epochs")
    args = parser.parse_args()
    console = Console(width=140)
    if args.references:
        print_references(console)
        return
    recipe = QUICK if args.quick else Recipe()
    record = Record.of(args, "standard", asdict(recipe), grid=[NX, NT], peers={})

    def measure(seed: int, name: str, *_: str) -> dict:
        run = Run(PROBLEMS[name], recipe, seed, console, args.mlp)
        run.train()
        seconds, steps, error = run.curve[-1]
        parameters = sum(parameter.numel() for parameter in run.network.parameters())
        report = {"seed": seed, "error": error, "seconds": seconds, "steps": steps}
        return report | {"curve": run.curve, "parameters": parameters}

    if args.peers or args.peers_to_the_end:
        run_peers(args, record, console)
    elif args.mlp:
        record.complete(product(args.seeds, args.problems, [MLP]), measure, group="peers")
    else:
        record.complete(product(args.seeds, args.problems), measure)
    content = record.read()
    console.print(table(content))
    record.path.with_suffix(".md").write_text(markdown(content))
    draw(content, record.path.with_suffix(".png"))


def print_references(console: Console) -> None:
    """Print the errors of all reference solutions, of the standard problems and of the families."""
    for name, problem in PROBLEMS.items():
        console.print(f"{name}: reference error {problem.reference_error():.1e}")
    for name, family in FAMILIES.items():
        for parameter in (family.base, *family.targets.values()):
            console.print(f"family {name}, {parameter:g}: reference error {family.reference_error(parameter):.1e}")
    burgers = FAMILIES["burgers"]
    for viscosity in (burgers.base, *burgers.targets.values()):
        x = family_axis()
        exact = cole_hopf(x[:, None], (x + 1) / 2, viscosity)
        error = burgers.reference(viscosity).numpy().reshape(exact.shape) - exact
        console.print(f"Cole-Hopf, {viscosity:g}: {np.linalg.norm(error) / np.linalg.norm(exact):.1e}")


def run_peers(args: argparse.Namespace, record: Record, console: Console) -> None:
    """jaxKAN on the problems whose residuals it has, for as many seconds as ours; or its splines for all epochs."""
    from problems.jaxkan_peers import EPOCHS, LAYERS, RESIDUALS, train

    if args.peers_to_the_end:
        run = train(args.peers_to_the_end, "spline", args.seeds[0], math.inf, console.print, EPOCHS)
        record.add(run, "peers", args.peers_to_the_end, f"spline, {EPOCHS} epochs")
        return
    problems = [name for name in args.problems if name in RESIDUALS]
    results = record.read()["results"]
    if missing := [name for name in problems if name not in results]:
        raise SystemExit(f"There is no run of {missing[0]} in {record.path}: run the study without --peers first.")

    def measure(seed: int, name: str, kind: str) -> dict:
        seconds = statistics.median(run["seconds"] for run in results[name])
        return train(name, kind, seed, seconds, console.print)

    record.complete(product(args.seeds, problems, LAYERS), measure, group="peers")


if __name__ == "__main__":
    main()
