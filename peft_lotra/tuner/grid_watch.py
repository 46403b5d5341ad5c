# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Notices changes of a base layer on which its adapters, or its formula, depend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..families.registry import Grid, same_grid


class GridWatch:
    """Answers whether the grid, dtype, device, mode or hooks of a base layer have changed since the last look.

    `changed` says whether they have since this flag was last set to `False`.
    """

    def __init__(self) -> None:
        self.changed = True
        self._state: list[Any] = []
        self._equal: set[int] = set()  # the recorded grids that were found equal to the grid, by id

    def __reduce__(self):
        return GridWatch, ()  # a copied layer has other tensors

    def look(self, layer: nn.Module, grid: Grid, parameter: torch.Tensor) -> bool:
        """Notes what has changed in a layer with this grid, whose coefficients are this parameter.

        Returns whether the grid has content that can be compared: on the meta device, or as a batch of grids under
        `torch.vmap`, it has none.
        """
        state: list[Any] = [parameter.dtype, parameter.device, layer.training, has_hooks(layer)]
        on_accelerator = False
        try:
            for value in grid.values():
                if isinstance(value, torch.Tensor):
                    if value.is_meta:
                        return False
                    version = None if value.is_inference() else value._version
                    state.append((id(value), version, value.data_ptr()))
                    on_accelerator |= value.device.type != "cpu"
                else:
                    state.append(value)
        except RuntimeError:
            return False
        if state != self._state:
            self.changed = True  # first: a process that is forked in between looks again
            self._equal.clear()
            self._state = state
        elif not on_accelerator:  # writing through `.data` leaves no trace; on an accelerator, comparing would wait
            self._equal.clear()
        return True

    def is_equal(self, grid: Grid, recorded: Mapping[str, Any]) -> bool:
        """Whether the grid, at which `look` has looked, is that of a record, up to casts and devices."""
        if id(recorded) not in self._equal:
            if not same_grid(recorded, grid):
                return False
            self._equal.add(id(recorded))
        return True

    def forget(self) -> None:
        """Compares all records again: the id of one may now be that of another."""
        self._equal.clear()


def has_hooks(module: nn.Module) -> bool:
    """Whether running the module does more than its `forward`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
