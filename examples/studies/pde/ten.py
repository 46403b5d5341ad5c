# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Ten problems by `peft_lotra.pde.solve`: its own network, a KAN and a tanh MLP, by the same call and CPU seconds.

Shown in docs/pde_results.md.

python examples/studies/pde/ten.py                            # 150 runs of 60 CPU s
python examples/studies/pde/ten.py --problems burgers --seeds 1 --seconds 20
python examples/studies/pde/ten.py --references               # errors of all reference solutions
python examples/studies/pde/ten.py --quick                    # tiny, to see it run

The standard problems, a flow, a reaction with diffusion, and an equation of fourth order. None of them was used
for the choice of `solve`'s network (docs/notes/log.md says how that was made), though its points, weights and phases
come from a recipe that was made with five of them. The networks of a problem and seed run one after the other, on one
thread.
Runs that are in ten.json are not repeated.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
from itertools import product

import torch
from problems.families import FAMILIES
from problems.more import MORE
from problems.solved import solve_problem
from problems.standard import PROBLEMS
from study_tools.records import Record
from study_tools.tables import table


torch.set_num_threads(1)

TEN = PROBLEMS | MORE
NETWORKS = {"solve": "splines, then tanh", "kan": "KAN", "mlp": "MLP"}


def _median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def markdown(record: dict) -> str:
    """Medians, and how far the other networks are from the MLP on the problems that have runs of both."""
    rows = {name: found for name, found in record["results"].items() if "mlp" in found and len(found) > 1}
    if not rows:
        return ""
    networks = [n for n in NETWORKS if any(n in found for found in rows.values())]
    medians = {name: {n: _median(found[n], "error") for n in networks if n in found} for name, found in rows.items()}
    lines = []
    for n in networks[:-1]:
        both = [name for name in rows if n in rows[name]]
        ratios = [medians[name][n] / medians[name]["mlp"] for name in both]
        first = statistics.geometric_mean(rows[name][n][0]["error"] / rows[name]["mlp"][0]["error"] for name in both)
        mean, wins = statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"{NETWORKS[n]}: {mean:.2g} times the error of the MLP in the geometric mean of "
            f"{len(both)} problems ({first:.2g} times on the first seed alone), better on {wins} of them."
        )
    lines += [
        f"Relative L2 errors by `solve` after {record['recipe']['seconds']:g} CPU s on a busy machine, medians "
        "(worst); the best in bold.\n",
    ]
    cells_of_rows = []
    for name, found in rows.items():
        runs, median = [found.get(n, []) for n in networks], medians[name]
        cells = []
        for n, of in zip(networks, runs, strict=True):
            text = f"{median[n]:.1e}" if of else ""
            text = f"**{text}**" if of and median[n] == min(median.values()) else text
            cells.append(text + (f" ({max(run['error'] for run in of):.1e})" if len(of) > 1 else ""))
        cells.append(", ".join(f"{_median(of, 'parameters'):,.0f}" if of else "-" for of in runs))
        cells_of_rows.append([TEN[name].title, *cells, ", ".join(str(len(of)) for of in runs)])
    header = f"| problem | {' | '.join(NETWORKS[n] for n in networks)} | parameters | seeds |"
    lines.append(table(header, cells_of_rows))
    return "\n".join(lines)


def print_references() -> None:
    """Print how much each reference solution changes with its resolution."""
    for name, problem in TEN.items():
        print(f"{name}: {problem.reference_error():.1e}")
    for name, family in FAMILIES.items():
        for parameter in (family.base, *family.targets.values()):
            print(f"{name}, {parameter:g}: {family.reference_error(parameter):.1e}")


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="150 minutes on one core",
        writes="ten.json, ten.md",
        folder=command_line.RESULTS / "pde",
        quick="three seconds a run: to see it run",
    )
    parser.add_choices("--problems", TEN)
    parser.add_choices("--networks", NETWORKS)
    parser.add_seeds(1, 2, 3, 4, 5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--references", action="store_true", help="print the errors of the references, and stop")
    args = parser.parse_args()
    if args.references:
        print_references()
        return
    seconds = 3.0 if args.quick else args.seconds
    problems = args.problems[-1:] if args.quick else args.problems
    record = Record.of(args, "ten", {"seconds": seconds})

    def measure(seed: int, name: str, network: str) -> dict:
        return solve_problem(TEN[name], network, seed, seconds)

    record.complete(product(args.seeds, problems, args.networks), measure)
    record.write_page(markdown)


if __name__ == "__main__":
    main()
