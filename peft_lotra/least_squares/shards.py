# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows that are divided among the processes of a `torch.distributed` group."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor


T = TypeVar("T")


class Shards:
    """The processes of a group, each with its own rows. Without a group, nothing is sent.

    All processes call the same methods in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.is_first = group is None or dist.get_rank(group) == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that tensor of the first process, in place."""
        if self.group is not None:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values
