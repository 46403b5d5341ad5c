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

    def __deepcopy__(self, memo: dict) -> Shards:
        return self  # of a group there is one

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
        try:
            result, error = function(*args), None
        except Exception as caught:
            result, error = None, caught
        failed = self.gather(f"{type(error).__name__}: {error}" if error is not None else "")
        if error is not None:
            raise error
        for rank, message in enumerate(failed):
            if message:
                raise RuntimeError(f"Process {rank} of the group failed: {message}")
        return result  # type: ignore[return-value]

    def count_rows(self, names: Sequence[str], rows: Sequence[int], weights: Sequence[float], start: Tensor) -> list:
        """The rows of each term in all processes.

        Raises:
            ValueError: The terms or the parameters are not the same in all processes, or a term has no rows.
        """
        if self.group is None:
            return list(rows)
        digest = hashlib.blake2b(start.cpu().numpy().tobytes()).hexdigest()
        found = self.gather((list(zip(names, weights, strict=True)), digest, list(rows)))
        for rank, (terms, other, _) in enumerate(found):
            if (terms, other) != found[0][:2]:
                what = f"trainable parameters of process {rank}" if terms == found[0][0] else f"terms {terms}"
                raise ValueError(
                    f"The {what} differ from those of process 0. Give all processes the same model (the same seed or "
                    f"file) and the same terms in the same order, with rows of their own: {found[0][0]}"
                )
        totals = [sum(counts) for counts in zip(*(counts for _, _, counts in found), strict=True)]
        for name, total in zip(names, totals, strict=True):
            if not total:
                raise ValueError(f"The {name} has no rows in any process.")
        return totals
