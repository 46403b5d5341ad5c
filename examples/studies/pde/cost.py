# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost of an iteration of Levenberg-Marquardt by width, for full fine-tuning and for a LoTRA adapter.

Shown in docs/benchmarks.md.

    python examples/studies/pde/cost.py  # widths 16 to 128, some minutes of one core
    python examples/studies/pde/cost.py --quick  # for CI

Burgers' equation on a [2, n, n, 1] KAN in float64, 1000 collocation points and 225 of boundary and start, ranks
(8, 8, 4). Each case runs in its own process. Seconds are the CPU time of the second iteration; memory is the peak of
the process minus its memory before.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import argparse
import json
import resource
import subprocess
import sys
import time

from study_tools import files
from study_tools.tables import table


WIDTHS = (16, 32, 64, 128)
RANKS = (8, 8, 4)


def peak() -> int:
    """Bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def measure(width: int, adapted: bool, points: int) -> dict:
    import torch
    from peft import get_peft_model
    from problems.families import FAMILIES

    from peft_lotra import LoTRAConfig
    from peft_lotra.kan import KAN
    from peft_lotra.least_squares import LevenbergMarquardt

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def model_and_terms(width: int, points: int):
        model = KAN([2, width, width, 1], dtype=torch.float64)
        if adapted:
            model = get_peft_model(model, LoTRAConfig(r=RANKS))
        return model.eval(), FAMILIES["burgers"].terms(0.08, torch.Generator().manual_seed(0), points)

    model, terms = model_and_terms(4, 40)
    LevenbergMarquardt(model).step(terms)  # excludes what torch loads and allocates at first use
    model, terms = model_and_terms(width, points)
    before = peak()
    optimizer = LevenbergMarquardt(model, memory=2**33)
    optimizer.step(terms)
    started = time.process_time()
    optimizer.step(terms)
    return {
        "width": width,
        "method": "LoTRA" if adapted else "full",
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": time.process_time() - started,
        "megabytes": (peak() - before) / 2**20,
    }


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="some minutes on one core",
        writes="lm_cost.json",
        folder=command_line.RESULTS / "pde",
        quick="small widths, few points: to see it run",
    )
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        width, adapted, points = map(int, args.case)
        print(json.dumps(measure(width, bool(adapted), points)))
        return
    widths, points = ((8, 16), 100) if args.quick else (WIDTHS, 1000)
    rows = []
    for width in widths:
        for adapted in (0, 1):
            command = [sys.executable, __file__, "--case", str(width), str(adapted), str(points)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    shown = [[f"{value:.3g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    print(table("| width | method | parameters | seconds | peak MB |", shown))
    files.write(files.path_of(args, "lm_cost"), {"points": points, "ranks": RANKS, "rows": rows})


if __name__ == "__main__":
    main()
