# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Maps around a network: features of the coordinates of a box, and the scale of the outputs.

Coordinates are scaled to the grid, periodic, or oscillating.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..kan.input_map import InputMap
from ..modules.checks import check_list
from .boxes import check_box


Frequencies = float | Sequence[float | Sequence[float]]  # periods across the box: for all coordinates, or for each

# cos(pi (turns s + phase / 2)) for s in [0, 1], by (turns, phase): integers, which are exact in every dtype
COSINE, SINE = (2, 0), (2, -1)
LINEAR = (0, 0)  # 2 s - 1


class BoxFeatures(InputMap):
    r"""Map the coordinates of a box to [-1, 1], the grid of a new KAN:

        2 s - 1                        for a coordinate with s in [0, 1] across the box,
        cos(2 pi s), sin(2 pi s)       for a periodic one: the network and all derivatives are periodic,
        cos(2 pi k s), sin(2 pi k s)   in addition, for each of its `frequencies` k, for solutions that oscillate.

    `jet` and `LevenbergMarquardt` differentiate the layer in closed form.

    Args:
        low, high: The ends of the box, I numbers each.
        periodic: The indices of periodic coordinates.
        frequencies: Periods across the box, multiples of 1/2 (of 1 for periodic coordinates): a number for all
            coordinates, or a number or a list of them for each, 0 or [] for none.

    Attributes:
        out_features: The number of features, I + len(periodic), and two for each frequency.

    Raises:
        ValueError: The box is empty, an index is out of range or a frequency cannot be used.

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
        frequencies: Frequencies = (),
    ) -> None:
        low_end, high_end = check_box(low, high)
        count = len(low_end)
        by_coordinate = check_frequencies(frequencies, count)
        periodic = check_list(periodic, "periodic", "a list of coordinates, such as [0]")
        for i in periodic:
            if isinstance(i, bool) or i not in range(count):
                raise ValueError(f"`periodic` has {i!r:.100}, but the box has coordinates 0 to {count - 1}.")

        sources = []
        waves = []
        for i in range(count):
            features = [LINEAR]
            if i in periodic:
                features = [COSINE, SINE]
            for frequency in by_coordinate[i]:
                turns = round(2 * frequency)
                if i in periodic and turns % 2:
                    raise ValueError(f"`frequencies` has {frequency} for coordinate {i}, which is periodic.")
                features += [(turns, 0), (turns, -1)]
            sources += [i] * len(features)
            waves += features

        super().__init__(count, sources)
        self.out_features = len(sources)
        self.periodic = sorted(set(periodic))
        self.frequencies = by_coordinate
        self.arguments = [low_end.tolist(), high_end.tolist(), self.periodic, by_coordinate]
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

    def extra_repr(self) -> str:
        box = f"low={self.low.tolist()}, high={self.high.tolist()}"
        return f"{box}, periodic={self.periodic}, frequencies={self.frequencies}"


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


def check_frequencies(frequencies: Frequencies, count: int) -> list[list[float]]:
    """Return the frequencies of each of `count` coordinates; raise a `ValueError` for one that cannot be used."""
    if isinstance(frequencies, (int, float)):
        frequencies = [frequencies] * count
    by_coordinate: list[list[float]] = []
    is_possible = True
    for entry in frequencies or [0] * count:
        values = [entry] if isinstance(entry, (int, float)) else entry
        values = [float(value) for value in values if value != 0]
        is_possible &= all(value > 0 and 2 * value % 1 == 0 for value in values)
        by_coordinate.append(values)
    if not is_possible or len(by_coordinate) != count:
        raise ValueError(
            f"`frequencies` is {frequencies}, but must be multiples of 1/2 above 0: one for all {count} "
            "coordinates, or a number or a list for each."
        )
    return by_coordinate
