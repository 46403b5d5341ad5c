# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Maps around a network: features of the coordinates of a box, and the scale of the outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..kan.input_map import InputMap
from ..modules.checks import check_list
from .boxes import check_box, warn_outside


# cos(pi (turns s + phase / 2)) for s in [0, 1], by (turns, phase): integers, which are exact in every dtype
COSINE, SINE = (2, 0), (2, -1)
LINEAR = (0, 0)  # 2 s - 1


class BoxFeatures(InputMap):
    r"""Map the coordinates of a box to [-1, 1], the grid of a new KAN:

        2 s - 1                    for a coordinate with s in [0, 1] across the box,
        cos(2 pi s), sin(2 pi s)   for a periodic one: the network and all derivatives are periodic.

    `jet` and `LevenbergMarquardt` differentiate the layer in closed form. Inputs outside of the box warn once.

    Args:
        low, high: The ends of the box, I numbers each.
        periodic: The indices of periodic coordinates.

    Attributes:
        out_features: The number of features, I + len(periodic).

    Raises:
        ValueError: The box is empty, or an index is out of range.

    Source: S. Dong and N. Ni, "A method for representing periodic functions and enforcing exactly periodic boundary
    conditions with deep neural networks", arXiv 2007.07442.
    """

    low: Tensor
    high: Tensor
    waves: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        periodic: Collection[int] = (),
    ) -> None:
        low_end, high_end = check_box(low, high)
        count = len(low_end)
        periodic = check_list(periodic, "periodic", "a list of coordinates, such as [0]")
        for i in periodic:
            if isinstance(i, bool) or i not in range(count):
                raise ValueError(f"`periodic` has {i!r:.100}, but the box has coordinates 0 to {count - 1}.")

        sources = []
        waves = []
        for i in range(count):
            features = [COSINE, SINE] if i in periodic else [LINEAR]
            sources += [i] * len(features)
            waves += features

        super().__init__(count, sources)
        self.out_features = len(sources)
        self.periodic = sorted(set(periodic))
        self.arguments = [low_end.tolist(), high_end.tolist(), self.periodic]
        self.has_warned = False  # of inputs outside of the box
        self.register_buffer("low", low_end)
        self.register_buffer("high", high_end)
        self.register_buffer("waves", torch.tensor(waves), persistent=False)

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """See `InputMap`."""
        low = self.low[self.sources].to(z)
        width = (self.high - self.low)[self.sources].to(z)
        turns, phase = self.waves.to(z).unbind(1)
        s = (z - low) / width
        rate = math.pi * turns
        zero = torch.zeros_like(width)
        lines = [2 * s - 1, 2 / width, *[zero] * highest]
        outputs = []
        for order in range(highest + 1):
            # a derivative of the cosine is the cosine a quarter turn ahead
            angle = rate * s + math.pi / 2 * (phase + order)
            wave = torch.cos(angle) * (rate / width) ** order
            output = torch.where(turns == 0, lines[order], wave)
            outputs.append(output)
        return outputs

    def check(self, x: Tensor) -> None:
        """See `InputMap`."""
        warn_outside(self, x)

    def extra_repr(self) -> str:
        return f"low={self.low.tolist()}, high={self.high.tolist()}, periodic={self.periodic}"


class OutputScale(InputMap):
    """Multiply the outputs of a network by a fixed factor, the size of the solution in the units of the user.

    Args:
        in_features: The number of outputs.
        factor: The factor.
    """

    def __init__(self, in_features: int, factor: float) -> None:
        super().__init__(in_features, range(in_features))
        self.factor = factor

    def evaluate(self, z: Tensor, highest: int) -> list[Tensor]:
        """See `InputMap`."""
        derivatives = [self.factor * z]
        for order in range(1, highest + 1):
            slope = self.factor if order == 1 else 0.0
            derivatives.append(torch.full_like(z, slope))
        return derivatives
