# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Sizes of blocks of rows, and memory that threads reuse between calls."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


# Sizes count entries of tensors. New memory costs as much as several passes over it, so operations go through blocks
# of rows and write into the same memory for each. To measure a size again, halve and double it here and run the script
# that its line names on an idle machine (`layers` is `examples/studies/benchmarks/run.py --only layers`).

# Of the basis (rows x inputs x basis functions) evaluated at a time: fits the cache.
EVALUATED = 2**18
# Fewest rows of the basis that enter a matrix product at a time: fewer cost it much of its speed.
MULTIPLIED_ROWS = 256
# Of all functions of a block in a jet, evaluated by hand.
JET_BLOCK = 2**20
# All of these on other devices than the CPU: only bound the memory.
OFF_CPU = 2**26
# Most that a thread keeps of each working memory.
KEPT = 2**22


_memories = threading.local()

# glibc gives freed memory beyond twice the largest block that was freed (of 32 MiB at most) back to the system, and
# each page of it costs again when it is next written to. A block of nearly that size, never written to, ends that.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def workspace(name: str, like: Tensor, *shape: int) -> Tensor:
    """Return uninitialized memory with the dtype and device of `like`.

    On the CPU, up to `KEPT` entries are reused from the thread's last call of that name.
    """
    count = math.prod(shape)
    if like.device.type != "cpu" or count > KEPT:
        return like.new_empty(shape)
    memory = getattr(_memories, name, None)
    if memory is None or memory.dtype != like.dtype or memory.numel() < count:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            memory = like.new_empty(count)
        if type(memory) is Tensor:  # not a tensor of a dispatch mode, such as a fake tensor
            setattr(_memories, name, memory)
    return memory[:count].view(shape)


def blocks(count: int, size: int) -> list[slice]:
    """Return slices of `size` rows for `count` rows."""
    return [slice(row, min(row + size, count)) for row in range(0, count, size)]
