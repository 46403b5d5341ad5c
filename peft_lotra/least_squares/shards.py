# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows that are divided among the processes of a group of `torch.distributed`: sums over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor


T = TypeVar("T")


class Shards:
    """The processes of a group, each with rows of its own; without a group this process alone, and nothing is sent.

    All processes call the same methods in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.is_first = group is None or dist.get_rank(group) == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by the sum over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def of_first(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by that of the first process: the last bits of a result depend on the machine."""
        if self.group is not None:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, value, group=self.group)
        return found

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a function in this process. If it fails in one, it fails in all, and none waits for another.

        Raises:
            RuntimeError: The function failed in another process alone.
        """
        if self.group is None:
            return function(*args)
        result = error = None
        try:
            result = function(*args)
        except Exception as caught:
            error = caught
        failed = self.gather(error and f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(failed):
            if message:
                raise RuntimeError(f"Process {rank} of the group failed: {message}")
        return result  # type: ignore[return-value]

    def count_rows(self, terms: Sequence[tuple[str, float, int]], start: Tensor) -> list[int]:
        """The rows of each term in all processes; a term is given as its name, its weight, and its rows here.

        Raises:
            ValueError: The terms or the parameters are not the same in all processes, or a term has no rows.
        """
        digest = hashlib.blake2b(start.cpu().numpy().tobytes()).hexdigest() if self.group is not None else ""
        found = self.gather(([term[:2] for term in terms], digest, [term[2] for term in terms]))
        for rank, (names, other, _) in enumerate(found):
            if (names, other) != found[0][:2]:
                what = f"trainable parameters of process {rank}" if names == found[0][0] else f"terms {names}"
                raise ValueError(
                    f"The {what} differ from those of process 0. Give all processes the same model (the same seed or "
                    f"file) and the same terms in the same order, with rows of their own: {found[0][0]}"
                )
        totals = [sum(counts) for counts in zip(*(counts for *_, counts in found), strict=True)]
        if 0 in totals:
            raise ValueError(f"The {terms[totals.index(0)][0]} has no rows in any process.")
        return totals
