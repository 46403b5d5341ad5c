# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The smooth family, elliptic with contrasts from 0.2 to 1, by POD of exact solutions beside a family of adapters.

    python examples/studies/parametric/smooth.py
    python examples/studies/parametric/smooth.py --quick

The coefficients of the modes are interpolated by cubic splines, or found by LSPG (least-squares Petrov-Galerkin): they
minimize the residual at the collocation points. The exact solutions are at evenly spaced contrasts. The errors of the
family, with as many members at the same contrasts, at the same unseen ones, are those of elliptic_0.json.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import json
import time

import numpy as np
from problems import families
from problems.parametric import PROBLEMS
from scipy.interpolate import CubicSpline
from study_tools import files


def errors_of(count: int, unseen: list[float], resolution: int) -> dict[str, list[float]]:
    """The relative L2 errors on the test grid, and the milliseconds of LSPG, at each unseen contrast."""
    problem = PROBLEMS["elliptic"]
    contrasts = np.array(problem.spaced(count))
    solutions = np.stack([np.linalg.solve(*families.elliptic_system(c, resolution)) for c in contrasts])
    modes = np.linalg.svd(solutions, full_matrices=False)[2]
    interpolated = CubicSpline(contrasts, solutions @ modes.T)
    found: dict[str, list[float]] = {"POD, interpolated": [], "POD, LSPG": [], "milliseconds": []}
    for c in unseen:
        matrix, right = families.elliptic_system(c, resolution)
        start = time.process_time()
        least = np.linalg.lstsq(matrix @ modes.T, right, rcond=None)[0]
        found["milliseconds"].append(1e3 * (time.process_time() - start))
        for name, coefficients in (("POD, interpolated", interpolated(c)), ("POD, LSPG", least)):
            error = families.elliptic_on_grid(coefficients @ modes, resolution) - problem.reference(c)
            found[name].append(float(np.linalg.norm(error) / np.linalg.norm(problem.reference(c))))
    return found


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about one minute of one core",
        writes="smooth.json, smooth.md",
        folder=command_line.RESULTS / "parametric",
        quick="a coarse grid and one unseen contrast",
    )
    args = parser.parse_args()
    known = json.loads((command_line.RESULTS / "parametric" / "elliptic_0.json").read_text())
    unseen, resolution = [row["c"] for row in known["rows"]], 36
    if args.quick:
        unseen, resolution = unseen[:1], 12
    rows = []
    for count, error in known["medians_by_members"]["uniform"].items():
        found = errors_of(int(count), unseen, resolution)
        rows.append({"solutions": int(count), "family": error} | {k: float(np.median(v)) for k, v in found.items()})
    prefix = "quick_" if args.quick else ""
    files.write(args.output / f"{prefix}smooth.json", {"rows": rows})
    lines = [
        "Median relative L2 errors at 20 unseen contrasts.\n",
        "| solutions or members | family | POD, interpolated | POD, LSPG | CPU ms of LSPG |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        errors = " | ".join(f"{row[name]:.1e}" for name in ("family", "POD, interpolated", "POD, LSPG"))
        lines.append(f"| {row['solutions']} | {errors} | {row['milliseconds']:.1f} |")
    (args.output / f"{prefix}smooth.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
