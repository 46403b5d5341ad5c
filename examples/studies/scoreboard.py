# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The scoreboard: tables that others published, solved by Levenberg-Marquardt on one thread, by a KAN and by an MLP.

Shown in docs/scoreboard.md.

    python examples/studies/scoreboard.py  # 1 seed of each row; runs that scoreboard.json has are not repeated
    python examples/studies/scoreboard.py --seeds 1 2 3 4 5
    python examples/studies/scoreboard.py --rows poisson_2 helmholtz

A run takes steps until the residual at points that are held out has stopped to fall, then goes on with a finer grid
(KANs), and undoes a grid that is worse there. The errors are those of the published tables. The equations of jaxKAN's
and SPIKAN's papers are solved by `peft_lotra.pde.solve`, unless ten.json has the run, with its own network (a layer of
splines, then tanh layers) in the column of the KAN; pykan runs its two notebooks beside. Seconds are CPU seconds of
one thread, without the evaluation of the error. Writes scoreboard.json, and the table of docs/scoreboard.md into
scoreboard.md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json
import math
import time
from dataclasses import replace
from statistics import median

import torch
from problems.published import DIFFUSION, PINNS, Subject
from problems.solved import solve_problem
from problems.standard import PROBLEMS, Problem
from study_tools import tables
from study_tools.records import Record
from study_tools.tables import short

from peft_lotra.kan import KAN, refine_grid
from peft_lotra.least_squares import LevenbergMarquardt


torch.set_num_threads(1)

QUICK_ROWS = ("poisson_2", "diffusion", "helmholtz")
PATIENCE = 15  # steps without a new minimum of the loss that is held out


# by `solve`: equations of jaxKAN's paper (arXiv 2407.17611), and of SPIKAN's (github.com/pnnl/spikans)
SOLVED: dict[str, tuple[Problem, str]] = {
    "helmholtz": (PROBLEMS["helmholtz"], "1.0e-3, 1,828 s; SPIKAN 1.3e-2"),
    "burgers": (PROBLEMS["burgers"], "2.4e-2, 1,411 s"),
    "allen_cahn_mild": (
        replace(PROBLEMS["allen_cahn"], title="Allen-Cahn, diffusion 1e-3", stop=1e-3),
        "1.4e-2, 1,212 s",
    ),
    "allen_cahn": (PROBLEMS["allen_cahn"], "SPIKAN 1.7e-1"),
}

GROUPS = {
    "Second-order PINNs: seconds to 1e-3 / 1e-4 / 1e-6 absolute RMS; the least error": PINNS,
    "jaxKAN (100,000 epochs, GPU) and SPIKAN: relative L2": {"diffusion": DIFFUSION, **SOLVED},
}
ROWS = {name: row for rows in GROUPS.values() for name, row in rows.items()}


def methods(name: str) -> tuple[str, ...]:
    row = ROWS[name]
    return row.methods if isinstance(row, Subject) else ("KAN", "MLP")


def train(subject: Subject, method: str, seed: int, steps: int) -> dict:
    """The record of one run."""
    torch.manual_seed(seed)
    problem, held = subject.problem, subject.problem.terms(method, seed, -1)
    seconds, taken, least, reached = 0.0, 0, math.inf, dict.fromkeys(map(str, subject.goals))
    clock = time.process_time()
    network = subject.network(method)
    model = problem.model(network, method)
    optimizer = LevenbergMarquardt(model, floor=1e-6, memory=2**32)

    def draw(_: int) -> list:
        optimizer.damping = min(optimizer.damping, 1e3)
        return problem.terms(method, seed, taken)

    def record(_: int, step: object) -> None:
        nonlocal seconds, taken, least, clock
        seconds, taken = seconds + time.process_time() - clock, taken + 1
        if subject.goals:
            error = problem.error(model)
            least = min(least, error)
            for goal in subject.goals:
                if error <= goal and reached[str(goal)] is None:
                    reached[str(goal)] = round(seconds, 2)
        clock = time.process_time()

    grids, best = subject.grids if isinstance(network, KAN) else (0,), math.inf
    for number, grid in enumerate(grids):
        before = copy.deepcopy((network.layers, model.state_dict())) if isinstance(network, KAN) else None
        if number:
            refine_grid(network, grid)
            optimizer.forget()
        share = (steps - taken) // (len(grids) - number)
        history = optimizer.fit(draw, share, held=held, patience=PATIENCE, callback=record, progress=False)
        found = min((step.held_loss for step in history), default=math.inf)
        if found > best and before is not None:
            network.layers, state = before
            model.load_state_dict(state)
            break
        best = found
    seconds += time.process_time() - clock
    error = problem.error(model)
    return {
        "error": error,
        "seconds": seconds,
        "steps": taken,
        "parameters": sum(p.numel() for p in model.parameters()),
        **({"reached": reached, "least": min(least, error)} if subject.goals else {}),
    }


def run(name: str, method: str, seed: int, quick: bool) -> dict:
    """One run by the recipe of its row."""
    row = ROWS[name]
    if not isinstance(row, Subject):
        network = "mlp" if method == "MLP" else "solve"
        there = json.loads((command_line.RESULTS / "pde" / "ten.json").read_text())["results"].get(name, {})
        kept = [run for run in there.get(network, []) if run["seed"] == seed and not quick]
        found = kept[0] if kept else solve_problem(row[0], network, seed, 3.0 if quick else 60.0)
        del found["phases"]
        if kept:
            return {**found, "source": "pde/ten.json"}
    else:
        found = train(row, method, seed, 6 if quick else row.steps)
    return {"seed": seed, **found}


def cell(runs: list[dict]) -> str:
    """Medians over the seeds: the error, with the largest one, and the seconds."""
    if not runs:
        return "-"
    if "reached" in runs[0]:
        times = [[run["reached"][goal] for run in runs] for goal in runs[0]["reached"]]
        words = [f"{median(found):.1f}" if None not in found else "-" for found in times]
        return f"{' / '.join(words)} s; {short(median(run['least'] for run in runs))}"
    errors = [run["error"] for run in runs]
    worst = f" ({short(max(errors))})" if len(errors) > 1 else ""
    return f"{short(median(errors))}{worst}, {median(run['seconds'] for run in runs):.1f} s"


def table(results: dict) -> str:
    """The table of docs/scoreboard.md."""
    lines = []
    for group, rows in GROUPS.items():
        lines.append([f"**{group}**", "", "", "", "", ""])
        for name, row in rows.items():
            runs = results.get(name, {})
            title, published = (row.title, row.published) if isinstance(row, Subject) else (row[0].title, row[1])
            kan, mlp, *others = ((method, cell(runs.get(method, []))) for method in methods(name))
            third = "; ".join(f"{method}: {text}" for method, text in others)
            count = min((len(found) for found in runs.values()), default=0)
            lines.append([title, published, kan[1], mlp[1], third, count])
    return tables.table("| | published | KAN | MLP | third network | seeds |", lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="a quarter of an hour on one core for each seed",
        writes="scoreboard.json, scoreboard.md",
        folder=command_line.RESULTS,
        quick="a few steps of three rows: to see it run",
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    args = parser.parse_args()
    rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    record = Record.of(args, "scoreboard", {"patience": PATIENCE})
    runs = []
    for seed in args.seeds:
        for name in rows:
            runs += [(seed, name, method) for method in methods(name)]
    record.complete(runs, lambda seed, name, method: run(name, method, seed, args.quick))
    record.write_page(lambda content: table(content["results"]))


if __name__ == "__main__":
    main()
