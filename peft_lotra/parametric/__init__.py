# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families of adapters that know their parameter."""

from .adapter import ParametricAdapter, Prediction
from .calibration import Calibration
from .interpolation import FamilyReport


__all__ = ["Calibration", "FamilyReport", "ParametricAdapter", "Prediction"]
