# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The smooth family, elliptic with contrasts from 0.2 to 1, by POD of exact solutions beside a family of adapters.

Shown in docs/parametric.md.

    python examples/studies/parametric/smooth.py
    python examples/studies/parametric/smooth.py --quick

The coefficients of the modes are interpolated by cubic splines, or found by LSPG (least-squares Petrov-Galerkin): they
minimize the residual at the collocation points. The exact solutions, and as many members of the family, are at evenly
spaced contrasts.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import time

import numpy as np
import torch
from problems import families
from problems.parametric import ELLIPTIC
from scipy.interpolate import CubicSpline
from study_tools import files
from study_tools.tables import table

from peft_lotra import ParametricAdapter


torch.set_num_threads(1)

LOW, HIGH = 0.2, 1.0
POINTS = 1500


def fit_family(base: torch.nn.Module, contrasts: list[float]) -> ParametricAdapter:
    family = ParametricAdapter(
        base,
        lambda c: ELLIPTIC.terms_of(c, POINTS, 0),
        ranks=8,
        held_terms_of=lambda c: ELLIPTIC.terms_of(c, POINTS * 2 // 3, 1000),
    )
    family.fit(contrasts, progress=False)
    return family


def errors_of(base: torch.nn.Module, count: int, unseen: list[float], resolution: int) -> dict[str, list[float]]:
    """The relative L2 errors on the test grid, and the milliseconds of LSPG, at each unseen contrast."""
    contrasts = np.linspace(LOW, HIGH, count)
    family = fit_family(base, contrasts.tolist())
    solutions = np.stack([np.linalg.solve(*families.elliptic_system(c, resolution)) for c in contrasts])
    modes = np.linalg.svd(solutions, full_matrices=False)[2]
    interpolated = CubicSpline(contrasts, solutions @ modes.T)
    found: dict[str, list[float]] = {"family": [], "POD, interpolated": [], "POD, LSPG": [], "milliseconds": []}
    for c in unseen:
        matrix, right = families.elliptic_system(c, resolution)
        start = time.process_time()
        least = np.linalg.lstsq(matrix @ modes.T, right, rcond=None)[0]
        found["milliseconds"].append(1e3 * (time.process_time() - start))
        found["family"].append(ELLIPTIC.error(family.predict(c), c))
        for name, coefficients in (("POD, interpolated", interpolated(c)), ("POD, LSPG", least)):
            error = families.elliptic_on_grid(coefficients @ modes, resolution) - ELLIPTIC.reference(c)
            found[name].append(float(np.linalg.norm(error) / np.linalg.norm(ELLIPTIC.reference(c))))
    return found


def as_text(rows: list[dict]) -> str:
    lines = [
        [row["solutions"], *(f"{row[name]:.1e}" for name in ("family", "POD, interpolated", "POD, LSPG"))]
        + [f"{row['milliseconds']:.1f}"]
        for row in rows
    ]
    header = "| solutions or members | family | POD, interpolated | POD, LSPG | CPU ms of LSPG |"
    return f"Median relative L2 errors at 20 unseen contrasts.\n\n{table(header, lines, left=0)}"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about two minutes of one core",
        writes="smooth.json, smooth.md",
        folder=command_line.RESULTS / "parametric",
        quick="a coarse grid, one unseen contrast and one family",
    )
    args = parser.parse_args()
    unseen, resolution, counts = np.random.default_rng(0).uniform(LOW, HIGH, 20).tolist(), 36, (4, 8, 12, 16, 24, 27)
    if args.quick:
        unseen, resolution, counts = unseen[:1], 12, (4,)
    base = ELLIPTIC.pretrained(0, POINTS * 5 // 3, 45)
    rows = []
    for count in counts:
        found = errors_of(base, count, unseen, resolution)
        rows.append({"solutions": count} | {name: float(np.median(values)) for name, values in found.items()})
    path = files.path_of(args, "smooth")
    files.write(path, {"rows": rows})
    files.write_page(path, as_text(rows))


if __name__ == "__main__":
    main()
