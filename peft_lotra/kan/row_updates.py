# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The updates of the rows of a batch: packed into the rows of one matrix, and in groups of equal ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tucker import Rank, Tucker, Update


# The sizes of groups, and the costs of a group and of a single row, in rows of a group.
# `examples/studies/benchmarks/bank.py`
_SIZES = [2**power for power in range(1, 9)]
_COST_OF_GROUP = 4.0
_COST_OF_ROW = 1.5


class PackedTucker(NamedTuple):
    """How Tucker tensors are packed into the rows of a matrix.

    A row holds the core, and then the factors. The modes of the core are reversed and factor_out and factor_in are
    transposed, in which order products of them are fastest.

    Attributes:
        shape: (O, I, K), or with a kernel (O, I, K, P). K counts the base branch if there is one.
        form: (ro, ri, rb [, rk]); tensors of lower ranks are filled with zeros. A mode that is full in all tensors is
            "full" and has no factor. If only some tensors are full in a mode, they get the identity as factor.
    """

    shape: tuple[int, ...]
    form: tuple[Rank, ...]

    # methods instead of properties: compiled code does not know properties of tuples

    def ranks(self) -> tuple[int, ...]:
        """Return the ranks, for full modes their sizes."""
        pairs = zip(self.shape, self.form, strict=True)
        return tuple([size if rank == "full" else rank for size, rank in pairs])

    def component_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the core and of the factor of each mode; no columns for a full mode."""
        columns = [0 if rank == "full" else rank for rank in self.form]
        return [self.ranks(), *zip(self.shape, columns, strict=True)]

    def with_room_for(self, tensor: Tucker | PackedTucker) -> PackedTucker:
        """Return the form that also holds another tensor."""
        form: list[Rank] = []
        ranks = tensor.ranks if isinstance(tensor, Tucker) else tensor.ranks()
        larger = map(max, self.ranks(), ranks)
        for rank, new_rank, larger_rank in zip(self.form, tensor.form, larger, strict=True):
            # a rank of 0 means that there are no tensors yet
            if new_rank == "full" and rank in ("full", 0):
                form.append("full")
            else:
                form.append(larger_rank)
        return self._replace(form=tuple(form))

    def width(self) -> int:
        """Return the length of a row."""
        return sum(map(math.prod, self.component_shapes()))

    def unpack(self, rows: Tensor) -> list[Any]:
        """Return views (R, ...) of the components of each row (R, width); None for the factor of a full mode."""
        shapes = self.component_shapes()
        widths = list(map(math.prod, shapes))
        core, *factors = rows.split(widths, dim=1)
        ranks, *factor_shapes = shapes
        core = core.unflatten(1, ranks[::-1])
        components: list[Any] = [_reverse_modes(core)]
        for mode, (size, rank) in enumerate(factor_shapes):
            factor = None
            if rank > 0 and mode < 2:
                factor = factors[mode].unflatten(1, (rank, size)).mT
            elif rank > 0:
                factor = factors[mode].unflatten(1, (size, rank))
            components.append(factor)
        return components

    def pack(self, updates: Sequence[Update | None], like: Tensor) -> Tensor:
        """Return the matrix (len(updates), width) of updates in the dtype of `like`. None is a zero update.

        No rank of an update is above this form. The base branch may be missing.
        """
        scales = [0.0 if update is None else update.scale for update in updates]
        columns = []
        for number, shape in enumerate(self.component_shapes()):
            if 0 in shape:  # the factor of a full mode
                continue
            components = []
            for update in updates:
                component = like.new_zeros(shape) if update is None else update.tensor[number]
                if component is None or component.shape != shape:
                    component = _pad_to(shape, component, like)
                components.append(component.to(like.device))
            stacked = torch.stack(components)
            stacked = stacked.to(torch.promote_types(stacked.dtype, like.dtype))
            if number == 0:  # the core
                scale = torch.tensor(scales, dtype=torch.float64, device="cpu").to(stacked)
                stacked = scale.view(-1, *[1] * len(shape)) * stacked
            if number < 3:
                stacked = _reverse_modes(stacked)
            columns.append(stacked.flatten(1))
        return torch.cat(columns, dim=1).to(like)


def _reverse_modes(tensors: Tensor) -> Tensor:
    """Reverse the modes of each of several tensors (R, ...)."""
    modes = range(1, tensors.dim())
    return tensors.permute(0, *reversed(modes))


def _pad_to(shape: Sequence[int], tensor: Tensor | None, like: Tensor) -> Tensor:
    """Append zeros to each mode up to a shape. None stands for the identity, of the dtype of `like`."""
    if tensor is None:
        return torch.eye(*shape, dtype=like.dtype, device=like.device)
    padding = []
    for size, length in zip(reversed(shape), reversed(tensor.shape), strict=True):
        padding += [0, size - length]
    return F.pad(tensor, padding)


class RowGroups(NamedTuple):
    """The rows of a batch in groups of `size` rows that have the same update.

    Attributes:
        index: (C,), int64, the update of each group.
        size: The number of rows of a group.
        order: (C size,), the row of the batch at each position of the groups; None for groups of one row in the order
            of the batch.
        positions: (N,), the position of each row of the batch. The outputs at other positions are not used.
    """

    index: Tensor
    size: int = 1
    order: Tensor | None = None
    positions: Tensor | None = None

    def batch(self) -> int:
        """Return the number N of rows."""
        # not `len`, which `torch.export` makes a constant
        if self.positions is None:
            return self.index.shape[0]
        return self.positions.shape[0]

    def to(self, device: torch.device) -> RowGroups:
        """Return the groups on a device."""
        moved = self._replace(index=self.index.to(device))
        if self.order is not None:
            moved = moved._replace(order=self.order.to(device))
        if self.positions is not None:
            moved = moved._replace(positions=self.positions.to(device))
        return moved

    def of_rows(self) -> Tensor:
        """Return the update of each row of the batch (N,)."""
        if self.positions is None:
            return self.index
        of_positions = self.index.repeat_interleave(self.size)
        return of_positions[self.positions]


def group_rows(index: Tensor) -> tuple[Tensor, RowGroups]:
    """Group the rows of a batch by their updates `index` (N,).

    An update of c rows gets ceil(c / size) groups, with the size that costs least.

    Returns:
        The distinct updates (M,), and the groups, whose index counts these.
    """
    sorted_index, sorted_rows = index.sort(stable=True)
    distinct, sorted_inverse, counts = sorted_index.unique_consecutive(return_inverse=True, return_counts=True)
    inverse = torch.empty_like(index)
    inverse.index_copy_(0, sorted_rows, sorted_inverse)
    cost_of_rows = len(index) * _COST_OF_ROW
    if len(distinct) * (_SIZES[0] + _COST_OF_GROUP) >= cost_of_rows:  # also without rows
        return distinct, RowGroups(inverse)

    sizes = torch.tensor(_SIZES, device=index.device)
    num_groups = (counts.unsqueeze(1) + sizes - 1) // sizes
    costs = num_groups.sum(0) * (sizes + _COST_OF_GROUP)
    cheapest = int(costs.argmin())
    if costs[cheapest] >= cost_of_rows:
        return distinct, RowGroups(inverse)

    size = _SIZES[cheapest]
    groups = num_groups[:, cheapest]
    updates = torch.arange(len(distinct), device=index.device)
    of_group = updates.repeat_interleave(groups)

    # Each update begins at a position that is a multiple of the size.
    first_position = (groups.cumsum(0) - groups) * size
    first_row = counts.cumsum(0) - counts
    gaps = first_position - first_row
    numbers = torch.arange(len(index), device=index.device)
    sorted_positions = numbers + gaps.repeat_interleave(counts)

    order = index.new_zeros(len(of_group) * size)
    order.index_copy_(0, sorted_positions, sorted_rows)
    positions = torch.empty_like(index)
    positions.index_copy_(0, sorted_rows, sorted_positions)
    return distinct, RowGroups(of_group, size, order, positions)


class RowUpdates(NamedTuple):
    """The updates of the rows of a batch: the rows of group c have `packed[groups.index[c]]`.

    Attributes:
        packed: (M, `form.width()`), one update in each row, in any floating dtype.
        groups: The rows of the batch by their updates.
        form: How a row is packed.
    """

    packed: Tensor
    groups: RowGroups
    form: PackedTucker
