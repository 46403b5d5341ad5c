# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Optimizers made for LoTRA: learning rates for each component, and AdamW for all adapters of a bank."""

from .bank import BankAdamW


__all__ = ["BankAdamW"]
