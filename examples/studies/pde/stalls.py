# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Where `peft_lotra.pde.solve` stalled, and six equations beside a tanh MLP by the same call and CPU seconds.

Shown in docs/pde_results.md.

python examples/studies/pde/stalls.py                            # all runs of 60 CPU s
python examples/studies/pde/stalls.py --problems wave --seeds 1
python examples/studies/pde/stalls.py --methods options          # with `windows=` or `frequencies=`
python examples/studies/pde/stalls.py --quick                    # tiny, to see it run

Four problems oscillate or have a thin layer, and stalled by the defaults of `solve` until commit 5704805, whose errors
are the method "before" (run with that version in PYTHONPATH). The six equations were named before they were run.
Runs that are in stalls.json are not repeated.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
from itertools import product

import torch
from problems.oscillations import SIX, STALLED, Case
from study_tools.records import Record, on_cpu_clock
from study_tools.tables import table
from torch import nn

from peft_lotra.pde import solve
from peft_lotra.pde.solution import Solution


torch.set_num_threads(1)

ALL = STALLED | SIX
METHODS = {"before": "before", "solve": "defaults", "options": "with options", "mlp": "MLP"}
WIDTH = 25  # of the three layers of an MLP


def new_mlp(case: Case, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(len(case.low), WIDTH), nn.Tanh()]
    for _ in range(2):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, case.outputs))


def run(case: Case, method: str, seed: int, seconds: float) -> dict:
    """Return the record of one call."""
    network = new_mlp(case, seed) if method == "mlp" else None
    options = case.options if method == "options" else {}

    def solve_case() -> Solution:
        return solve(
            case.residual,
            case.low,
            case.high,
            distance=case.distance,
            lift=case.lift,
            network=network,
            seconds=seconds,
            seed=seed,
            progress=False,
            **options,
        )

    solution, report = on_cpu_clock(solve_case)
    return {
        "seed": seed,
        "error": case.error(solution.model),
        **report,
        "parameters": sum(parameter.numel() for parameter in solution.model.parameters()),
        "phases": [[phase.name, phase.steps, phase.held, phase.reason, *phase[7:]] for phase in solution.phases],
    }


def is_wanted(name: str, method: str) -> bool:
    if method == "options":
        return bool(ALL[name].options)
    return name in SIX or method != "mlp"


def markdown(record: dict) -> str:
    """Median errors, the networks that won, and the ratio to the MLP on the six equations."""
    results = record["results"]
    lines = []
    both = [name for name in SIX if {"solve", "mlp"} <= results.get(name, {}).keys()]
    if both:
        ratios = {name: _error(results[name]["solve"]) / _error(results[name]["mlp"]) for name in both}
        mean, worst = statistics.geometric_mean(ratios.values()), max(ratios, key=ratios.__getitem__)
        lines.append(
            f"{mean:.2g} times the error of the MLP in the geometric mean of {len(both)} equations, at most "
            f"{ratios[worst]:.2g} times ({ALL[worst].title})."
        )
    lines += [
        f"Relative L2 errors by `solve` after {record['recipe']['seconds']:g} CPU s on a busy machine, medians of the "
        "seeds.\n",
    ]
    rows = []
    for name, case in ALL.items():
        runs = results.get(name, {})
        if runs:
            cells = [f"{_error(runs[method]):.1e}" if method in runs else "" for method in METHODS]
            winners = sorted({run["phases"][-1][-1] for run in runs.get("solve", [])})
            seeds = ", ".join(str(len(runs.get(method, []))) for method in METHODS)
            rows.append([case.title, *cells, ", ".join(winners), seeds])
    lines.append(table(f"| problem | {' | '.join(METHODS.values())} | by defaults | seeds |", rows))
    return "\n".join(lines)


def _error(runs: list[dict]) -> float:
    return statistics.median(run["error"] for run in runs)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half an hour a seed on one core",
        writes="stalls.json, stalls.md",
        folder=command_line.RESULTS / "pde",
        quick="three seconds a run: to see it run",
    )
    parser.add_choices("--problems", ALL)
    parser.add_choices("--methods", METHODS, default=list(METHODS)[1:])
    parser.add_seeds(0, 1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    args = parser.parse_args()
    seconds = 3.0 if args.quick else args.seconds
    problems = args.problems[:1] if args.quick else args.problems
    record = Record.of(args, "stalls", {"seconds": seconds})

    def measure(seed: int, name: str, method: str) -> dict:
        return run(ALL[name], method, seed, seconds)

    runs = product(args.seeds, problems, args.methods)
    record.complete((run for run in runs if is_wanted(*run[1:])), measure)
    record.write_page(markdown)


if __name__ == "__main__":
    main()
