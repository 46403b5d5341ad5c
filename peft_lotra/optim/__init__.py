# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Optimizers made for LoTRA: learning rates per component, and Levenberg-Marquardt."""

from .bank import BankAdamW, BankLevenbergMarquardt, BankStep
from .learning_rates import create_lotra_optimizer, lotra_lr_multipliers
from .levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep


__all__ = [
    "BankAdamW",
    "BankLevenbergMarquardt",
    "BankStep",
    "LevenbergMarquardt",
    "LevenbergMarquardtStep",
    "create_lotra_optimizer",
    "lotra_lr_multipliers",
]
