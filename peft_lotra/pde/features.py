# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates of a box as inputs of a network: scaled to the grid, periodic, or even at the ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..kan.input_map import InputMap
from .boxes import check_box


# cos(pi (turns s + phase / 2)) for s in [0, 1], by (turns, phase): integers, which are exact in every dtype
_COSINE, _SINE, _EVEN, _LINEAR = (2, 0), (2, -1), (1, 2), (0, 0)


class BoxFeatures(InputMap):
    r"""A layer before a KAN that maps the coordinates of a box to [-1, 1], the grid of a new KAN:

        2 s - 1                        for a coordinate with s in [0, 1] across the box,
        cos(2 pi s), sin(2 pi s)       for a periodic one: the network and all derivatives are periodic,
        -cos(pi s)                     for one with Neumann conditions: the network's derivative is 0 at both ends.

    `jet` and `LevenbergMarquardt` know the layer in closed form.

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
        >>> [bool((u.diff(dim=-2).abs() < 1e-4).all()) for u in ends]
        [True, True, True]
    """

    low: Tensor
    high: Tensor
    waves: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        periodic: Collection[int] = (),
        neumann: Collection[int] = (),
    ) -> None:
        low_end, high_end = check_box(low, high)
        count = len(low_end)
        for name, indices in (("periodic", periodic), ("neumann", neumann)):
            if wrong := [i for i in indices if isinstance(i, bool) or i not in range(count)]:
                raise ValueError(f"`{name}` has {wrong[0]!r:.100}, but the box has coordinates 0 to {count - 1}.")
        if both := set(periodic) & set(neumann):
            raise ValueError(f"Coordinate {min(both)} is both `periodic` and `neumann`, which exclude each other.")
        sources, waves = [], []
        for i in range(count):
            of_coordinate = [_COSINE, _SINE] if i in periodic else [_EVEN if i in neumann else _LINEAR]
            sources += [i] * len(of_coordinate)
            waves += of_coordinate
        super().__init__(count, sources)
        self.out_features = len(sources)
        self.periodic, self.neumann = sorted(set(periodic)), sorted(set(neumann))
        self.register_buffer("low", low_end)
        self.register_buffer("high", high_end)
        self.register_buffer("waves", torch.tensor(waves), persistent=False)

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """See `InputMap`."""
        low, width = self.low[self.sources].to(z), (self.high - self.low)[self.sources].to(z)
        turns, phase = self.waves.to(z).unbind(1)
        s, rate = (z - low) / width, math.pi * turns
        lines = [2 * s - 1, 2 / width, *[torch.zeros_like(width)] * highest]
        outputs = []
        for order in range(highest + 1):
            # a derivative of the cosine is the cosine a quarter turn ahead
            wave = torch.cos(rate * s + math.pi / 2 * (phase + order)) * (rate / width) ** order
            outputs.append(torch.where(turns == 0, lines[order], wave))
        return outputs

    def extra_repr(self) -> str:
        return f"low={self.low.tolist()}, high={self.high.tolist()}, periodic={self.periodic}, neumann={self.neumann}"
