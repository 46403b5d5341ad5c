# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""PDEs by KANs: `solve`, exact conditions, shapes and points."""

from .adaptive import ResidualSampler
from .boundary import robin
from .boxes import box_points, side_points
from .constraints import BoxDistance, HardConstraint
from .regions import Region, disk, polygon
from .saving import load_network
from .solver import solve


__all__ = [
    "BoxDistance",
    "HardConstraint",
    "Region",
    "ResidualSampler",
    "box_points",
    "disk",
    "load_network",
    "polygon",
    "robin",
    "side_points",
    "solve",
]
