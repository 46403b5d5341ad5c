# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""Levenberg-Marquardt with its rows divided among processes: memory and seconds of each, beside one process.

    torchrun --nproc-per-node 2 examples/studies/pde/shards.py

Each process has every second point of an elliptic problem. J^T J, J^T r and losses are summed by `all_reduce`; the
Jacobian of a process is as large as its rows. The first process then takes the same steps with all rows alone.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import copy
import json
import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from problems.families import FAMILIES
from study_tools import files
from torch import nn

from peft_lotra.kan import KAN
from peft_lotra.optim import LevenbergMarquardt


torch.set_num_threads(1)


def peak() -> float:
    """The most memory that this process had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(model: nn.Module, terms: list[tuple], steps: int, group: Any, before: float) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    records = LevenbergMarquardt(model, floor=1e-6, memory=2**32, group=group).fit(terms, steps, progress=False)
    return {
        "rows": sum(len(rows[0]) for _, rows, *_ in terms),
        "losses": [record.loss for record in records],
        "MiB_above_start": peak() - before,
        "seconds_of_a_step": (time.perf_counter() - start) / len(records),
        "CPU_seconds_of_a_step": (time.process_time() - cpu) / len(records),
    }


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="a minute on two cores",
        writes="shards.json",
        folder=command_line.RESULTS / "pde",
        quick="few points, to see that it runs",
    )
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    points, steps, width = (300, 2, 4) if args.quick else (args.points, args.steps, 16)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = KAN([2, width, width, 1], dtype=torch.float64)
    alone = copy.deepcopy(model)
    terms = FAMILIES["elliptic"].terms(0.5, torch.Generator().manual_seed(0), points)
    mine = [(function, tuple(row[rank::world] for row in rows), weight) for function, rows, weight in terms]
    found: list[Any] = [None] * world
    before = peak()
    dist.all_gather_object(found, run(model, mine, steps, dist.group.WORLD, before))
    if rank == 0:
        whole = run(alone, terms, steps, None, before)  # needs more, or the peak would not rise
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        difference = max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)
        result = {"processes": found, "one_process": whole, "relative_difference_of_parameters": difference}
        files.write(args.output / ("quick_shards.json" if args.quick else "shards.json"), result)
        print(json.dumps(result, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
