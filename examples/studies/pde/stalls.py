# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Where `peft_lotra.pde.solve` may stall: five problems with oscillations or a thin layer, by its defaults.

Shown in docs/pde_results.md.

python examples/studies/pde/stalls.py                            # all runs of 60 CPU s
python examples/studies/pde/stalls.py --problems wave --seeds 1
python examples/studies/pde/stalls.py --quick                    # tiny, to see it run

Runs that are in stalls.json are not repeated.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
from itertools import product

import torch
from problems.oscillations import CASES, Case
from study_tools.records import Record, on_cpu_clock
from study_tools.tables import table

from peft_lotra.pde import solve
from peft_lotra.pde.solution import Solution


torch.set_num_threads(1)


def run(case: Case, seed: int, seconds: float) -> dict:
    """Return the record of one call."""

    def solve_case() -> Solution:
        conditions = {"distance": case.distance, "lift": case.lift}
        return solve(case.residual, case.low, case.high, **conditions, seconds=seconds, seed=seed, progress=False)

    solution, report = on_cpu_clock(solve_case)
    return {
        "seed": seed,
        "error": case.error(solution.model),
        **report,
        "parameters": sum(parameter.numel() for parameter in solution.model.parameters()),
        "phases": [[phase.name, phase.steps, phase.held, phase.reason, *phase[7:]] for phase in solution.phases],
    }


def markdown(record: dict) -> str:
    """Median errors, and the networks that won."""
    rows = []
    for name, runs in record["results"].items():
        error = statistics.median(run["error"] for run in runs)
        winners = sorted({run["phases"][-1][-1] for run in runs})
        rows.append([CASES[name].title, f"{error:.1e}", ", ".join(winners), len(runs)])
    seconds = record["recipe"]["seconds"]
    title = f"Relative L2 errors by `solve` after {seconds:g} CPU s on a busy machine, medians of the seeds."
    return f"{title}\n\n{table('| problem | error | network | seeds |', rows)}"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="five minutes a seed on one core",
        writes="stalls.json, stalls.md",
        folder=command_line.RESULTS / "pde",
        quick="three seconds a run: to see it run",
    )
    parser.add_choices("--problems", CASES)
    parser.add_seeds(0, 1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    args = parser.parse_args()
    seconds = 3.0 if args.quick else args.seconds
    problems = args.problems[:1] if args.quick else args.problems
    record = Record.of(args, "stalls", {"seconds": seconds})
    record.complete(product(args.seeds, problems), lambda seed, name: run(CASES[name], seed, seconds))
    record.write_page(markdown)


if __name__ == "__main__":
    main()
