# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Burgers' equation over a range of 200 in the viscosity, by a family of at most 15 members.

Shown in docs/parametric.md.

    python examples/studies/parametric/wide.py --seeds 0 1 2 3 4
    python examples/studies/parametric/wide.py --quick  # to see it run

The range, 0.005 to 1, and the number of unseen viscosities are those of GPT-PINN (github.com/skoohy/GPT-PINN), which
takes 129 candidates and 9 networks of 60,000 epochs, 0.89 h on a GPU, and reports no errors; here they are spaced
evenly in the logarithm. Errors are relative L2, against a spectral solution. A member has 1,560 coefficients, and
3,000 points: with 1,500, a base or a member can fit each of them and be wrong between them.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from problems.parametric import BURGERS
from study_tools import files, machine, tables

from peft_lotra import ParametricAdapter


torch.set_num_threads(1)

LOW, HIGH = 0.005, 1.0
WIDE = replace(BURGERS, base=0.07, before=(0.5, 0.2))


def run(seed: int, points: int, steps: int, members: int, unseen: int) -> dict:
    clock = time.process_time()
    base = WIDE.pretrained(seed, points, steps)
    family = ParametricAdapter(base, lambda c: WIDE.terms_of(c, points, seed), log=True)
    report = family.fit(between=(LOW, HIGH), max_members=members, progress=False)
    seconds, rows = time.process_time() - clock, []
    for c in np.geomspace(LOW, HIGH, unseen + 2)[1:-1].tolist():
        found = {"predicted": family.predict(c), "one step": family.refine(c)}
        rows.append({"viscosity": c} | {name: WIDE.error(model, c) for name, model in found.items()})
    return {
        "seed": seed,
        "seconds": seconds,
        "members": [(c, WIDE.error(family.predict(c), c)) for c in family.parameters],
        "failed": [float(c) for c in report.failed],
        "rows": rows,
        "machine": machine.describe(),
        "commit": machine.commit(),
    }


def table(results: list[dict]) -> str:
    lines = []
    for found in results:
        of = [error for _, error in found["members"]]
        cells = []
        for name in ("predicted", "one step"):
            errors = [row[name] for row in found["rows"]]
            cells.append(f"{statistics.median(errors):.1e}, {max(errors):.1e}")
        errors = f"{min(of):.1e} to {max(of):.1e}"
        lines.append([found["seed"], f"{found['seconds']:.0f}", len(of), len(found["failed"]), errors, *cells])
    title = "Relative L2 errors at 25 unseen viscosities from 0.005 to 1 (median, worst), and of the members."
    header = "| seed | CPU s | members | failed | errors of members | predicted | one step |"
    return f"{title}\n\n{tables.table(header, lines)}"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about four minutes of one core for each seed",
        writes="wide.json, wide.md",
        folder=command_line.RESULTS / "parametric",
        quick="a tiny setting, to see that it runs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    sizes = (100, 3, 3, 2) if args.quick else (3000, 45, 15, 25)
    results, path = [], files.path_of(args, "wide")
    for seed in args.seeds[:1] if args.quick else args.seeds:
        results.append(run(seed, *sizes))
        files.replace(path, results)
        files.write_page(path, table(results))


if __name__ == "__main__":
    main()
