# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Building blocks for solving PDEs by KANs: exact conditions, points, weights, and continuation."""

from .constraints import BoxDistance, HardConstraint
from .features import BoxFeatures


__all__ = ["BoxDistance", "BoxFeatures", "HardConstraint"]
