# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Building blocks for solving PDEs by KANs: exact conditions, points, weights, and continuation."""

from .adaptive import ResidualSampler, gradient_weights
from .boundary import neumann, robin
from .boxes import box_points, side_points
from .constraints import BoxDistance, HardConstraint
from .continuation import ContinuationStep, continuation
from .features import BoxFeatures
from .regions import Region, disk, polygon
from .saving import load_network
from .solution import Phase, Solution
from .solver import solve
from .unknowns import Estimate
from .windows import Windows


__all__ = [
    "BoxDistance",
    "BoxFeatures",
    "ContinuationStep",
    "Estimate",
    "HardConstraint",
    "Phase",
    "Region",
    "ResidualSampler",
    "Solution",
    "Windows",
    "box_points",
    "continuation",
    "disk",
    "gradient_weights",
    "load_network",
    "neumann",
    "polygon",
    "robin",
    "side_points",
    "solve",
]
