# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates of a box as inputs of a network: scaled to the grid, periodic, or even at the ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kan.input_map import InputMap
from .boxes import check_box


class BoxFeatures(InputMap):
    r"""A layer before a KAN that maps the coordinates of a box to [-1, 1], the grid of a new KAN.

    With s in [0, 1] the place in the box, a coordinate becomes 2 s - 1; a periodic one becomes two features
    cos(2 pi s), sin(2 pi s), so that the network and all its derivatives are periodic; one with Neumann conditions
    becomes -cos(pi s), so that the derivative of the network is zero at both ends. `jet` and
    `LevenbergMarquardt` know the layer in closed form.

    Args:
        low, high: The ends of the box, I numbers each.
        periodic: The indices of periodic coordinates.
        neumann: The indices of coordinates with Neumann conditions.

    Attributes:
        out_features: The number of features, I + len(periodic).

    Raises:
        ValueError: The box is empty, or an index is out of range or in both lists.

    Source: S. Dong and N. Ni, "A method for representing periodic functions and enforcing exactly periodic boundary
    conditions with deep neural networks", arXiv 2007.07442.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> from peft_lotra.pde import BoxFeatures
        >>> features = BoxFeatures((-1, 0), (1, 1), periodic=[0])
        >>> model = torch.nn.Sequential(features, KAN([features.out_features, 5, 1]))
        >>> ends = jet(model, torch.tensor([[-1.0, 0.3], [1.0, 0.3]]))
        >>> all(torch.allclose(part[..., :1, :], part[..., 1:, :], atol=1e-4) for part in ends)
        True
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        periodic: Collection[int] = (),
        neumann: Collection[int] = (),
    ) -> None:
        low_end, high_end = check_box(low, high)
        count = len(low_end)
        periodic, neumann = (_indices(given, count) for given in (periodic, neumann))
        if both := set(periodic) & set(neumann):
            raise ValueError(f"Coordinate {min(both)} is both `periodic` and `neumann`, which exclude each other.")
        kinds = []
        for i in range(count):
            kinds += [(i, "cos"), (i, "sin")] if i in periodic else [(i, "even" if i in neumann else "linear")]
        super().__init__(count, [i for i, _ in kinds])
        self.out_features = len(kinds)
        self.periodic, self.neumann = periodic, neumann
        self.register_buffer("low", low_end)
        self.register_buffer("high", high_end)
        # each feature is linear, or amplitude cos(rate s + phase)
        waves = {"cos": (2 * math.pi, 0.0), "sin": (2 * math.pi, -math.pi / 2), "even": (math.pi, math.pi)}
        self._waves = [waves.get(kind) for _, kind in kinds]

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InputMap`."""
        low, width = self.low[self.sources].to(z), (self.high - self.low)[self.sources].to(z)
        s = (z - low) / width
        columns = []
        for j, wave in enumerate(self._waves):
            at, per_unit = s[..., j], 1 / width[j]
            if wave is None:
                columns.append((2 * at - 1, 2 * per_unit.expand_as(at), torch.zeros_like(at)))
                continue
            rate, phase = wave
            cosine, sine = torch.cos(rate * at + phase), torch.sin(rate * at + phase)
            columns.append((cosine, -rate * per_unit * sine, -((rate * per_unit) ** 2) * cosine))
        value, slope, bend = (torch.stack(parts, -1) for parts in zip(*columns, strict=True))
        return value, slope, bend

    def extra_repr(self) -> str:
        return f"low={self.low.tolist()}, high={self.high.tolist()}, periodic={self.periodic}, neumann={self.neumann}"


def _indices(given: Any, count: int) -> list[int]:
    """The given indices of coordinates, each once."""
    if not isinstance(given, Iterable):
        raise TypeError(f"`periodic` and `neumann` must be lists of indices, such as [0], but one is {given!r:.100}.")
    given = list(given)
    if wrong := [i for i in given if isinstance(i, bool) or i not in range(count)]:
        raise ValueError(
            f"`periodic` or `neumann` has {wrong[0]!r:.100}, but the box has coordinates 0 to {count - 1}."
        )
    return sorted({int(i) for i in given})
