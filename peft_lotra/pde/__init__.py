# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""PDEs by KANs: `solve`, exact conditions, shapes and points."""

from .adaptive import ResidualSampler
from .boundary import robin
from .boxes import box_points, side_points
from .constraints import BoxDistance, HardConstraint
from .regions import Region, disk, polygon
from .saving import load_network
from .solution import Phase, Solution
from .solver import solve
from .unknowns import Estimate


__all__ = [
    "BoxDistance",
    "Estimate",
    "HardConstraint",
    "Phase",
    "Region",
    "ResidualSampler",
    "Solution",
    "box_points",
    "disk",
    "load_network",
    "polygon",
    "robin",
    "side_points",
    "solve",
]
