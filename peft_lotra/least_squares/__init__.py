# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Nonlinear least squares by Levenberg-Marquardt, for any model with few trainable parameters."""

from .levenberg_marquardt import LevenbergMarquardt


__all__ = ["LevenbergMarquardt"]
