# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One process of a group that `test_shards.py` starts: python sharded_worker.py results.json

Takes Levenberg-Marquardt steps with a part of the rows, and writes what it ends with.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from process_groups import run_worker
from residuals import network, terms
from torch import Tensor

from peft_lotra.least_squares import LevenbergMarquardt


Shard = Callable[[Tensor], Tensor]


def rows_of(rank, world):
    """A third of the rows for the first of two, so that shards are not equal."""
    return lambda row: row[: len(row) // 3] if rank == 0 and world == 2 else row[len(row) // 3 :]


def everything(row):
    return row


def parts(shard):
    torch.manual_seed(3)
    return [(function, tuple(map(shard, rows)), weight) for function, rows, weight in terms(points=240)]


def model(seed=0):
    torch.manual_seed(seed)
    return network()


KINDS = {"plain": {}, "forgetting": {"forgetting": 0.5}, "chunks": {"memory": 2**21}}


def run(kind, shard, group, seed=0):
    """Four steps, with rows that are held out."""
    kan = model(seed)
    optimizer = LevenbergMarquardt(kan, floor=1e-6, group=group, **KINDS[kind])
    records = optimizer.fit(parts(shard), 4, held=parts(shard), progress=False)
    return {
        "parameters": [value for part in kan.parameters() for value in part.flatten().tolist()],
        "losses": [record.losses for record in records],
        "held": [record.held_loss for record in records],
    }


def fails_with(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def wrong(rank, shard):
    """The errors of what processes may do wrong; none of them may hang."""
    group, (first, second) = dist.group.WORLD, parts(shard)

    def step(given):
        return LevenbergMarquardt(model(), group=group).step(given)

    def nan(kan, x, y):
        return kan(x) - y / (0.0 if rank else 1.0)

    none = (second[0], tuple(row[:0] for row in second[1]))
    return {
        "other terms": fails_with(lambda: step([first, second][: 1 + rank])),
        "other weights": fails_with(lambda: step([(*second[:2], 1.0 + rank)])),
        "no rows at all": fails_with(lambda: step([first, none])),
        "one is not finite": step([(nan, second[1])]).reason,
    }


def results(rank, world):
    mine, group = rows_of(rank, world), dist.group.WORLD
    return {
        "alone": {kind: run(kind, everything, None) for kind in KINDS},
        "sharded": {kind: run(kind, mine, group) for kind in KINDS},
        "nothing here": run("plain", (lambda row: row[:0]) if rank else everything, group),
        "another start": run("plain", mine, group, seed=rank),
        "wrong": wrong(rank, mine),
    }


if __name__ == "__main__":
    run_worker(results)
