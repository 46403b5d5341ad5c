# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Optimizers made for LoTRA: learning rates per component, and Levenberg-Marquardt."""

from ..least_squares import LevenbergMarquardt, LevenbergMarquardtStep
from .bank import BankAdamW
from .learning_rates import create_lotra_optimizer


__all__ = [
    "BankAdamW",
    "LevenbergMarquardt",
    "LevenbergMarquardtStep",
    "create_lotra_optimizer",
]
