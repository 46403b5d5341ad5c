# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One process of a group that `test_shards.py` starts: python sharded_worker.py results.json

Takes Levenberg-Marquardt steps with a part of the rows, and writes what it ends with.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from process_groups import run_worker
from residuals import network, terms
from torch import Tensor, nn

from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt


Shard = Callable[[Tensor], Tensor]


def rows_of(rank: int, world: int) -> Shard:
    """A third of the rows for the first of two, so that shards are not equal."""
    return lambda row: row[: len(row) // 3] if rank == 0 and world == 2 else row[len(row) // 3 :]


def everything(row: Tensor) -> Tensor:
    return row


def parts(shard: Shard) -> list[tuple]:
    torch.manual_seed(3)
    return [(function, tuple(map(shard, rows)), weight) for function, rows, weight in terms(points=240)]


def model(seed: int = 0) -> KAN:
    torch.manual_seed(seed)
    return network()


KINDS: dict[str, dict[str, Any]] = {"plain": {}, "forgetting": {"forgetting": 0.5}, "chunks": {"memory": 2**21}}


def run(kind: str, shard: Shard, group: Any, seed: int = 0) -> dict:
    """Four steps, with rows that are held out."""
    kan = model(seed)
    optimizer = LevenbergMarquardt(kan, floor=1e-6, group=group, **KINDS[kind])
    records = optimizer.fit(parts(shard), 4, held=parts(shard), progress=False)
    return {
        "parameters": [value for part in kan.parameters() for value in part.flatten().tolist()],
        "losses": [record.losses for record in records],
        "held": [record.held_loss for record in records],
    }


def fails_with(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def wrong(rank: int, shard: Shard) -> dict[str, str]:
    """The errors of what processes may do wrong; none of them may hang."""
    group, (first, second) = dist.group.WORLD, parts(shard)

    def step(given: list[tuple]) -> Any:
        return LevenbergMarquardt(model(), group=group).step(given)

    def nan(kan: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return kan(x) - y / (0.0 if rank else 1.0)

    none = (second[0], tuple(row[:0] for row in second[1]))
    return {
        "other terms": fails_with(lambda: step([first, second][: 1 + rank])),
        "other weights": fails_with(lambda: step([(*second[:2], 1.0 + rank)])),
        "no rows at all": fails_with(lambda: step([first, none])),
        "one is not finite": step([(nan, second[1])]).reason,
    }


def results(rank: int, world: int) -> dict[str, Any]:
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
