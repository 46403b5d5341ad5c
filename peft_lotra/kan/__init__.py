# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Kolmogorov-Arnold networks of B-splines, dense and Slim, with their derivatives, and as transformers models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .basis import bspline_basis
from .bounding import TanhBound
from .configuration_kan import KANConfig
from .jets.derivatives import hessian, jet, laplacian
from .knots import KnotMap
from .layer import KANLinear
from .modeling_kan import KANModel
from .network import KAN
from .refinement import RefinementReport, refine_grid
from .slim_kan import SlimKAN, SlimKANLinear


slim: Callable[..., Any]  # `peft_lotra.slim`, set by the package: it compresses the layers of any library

__all__ = [
    "KAN",
    "KANConfig",
    "KANLinear",
    "KANModel",
    "KnotMap",
    "RefinementReport",
    "SlimKAN",
    "SlimKANLinear",
    "TanhBound",
    "bspline_basis",
    "hessian",
    "jet",
    "laplacian",
    "refine_grid",
    "slim",
]

# Files of adapters name the module of the base's class: the public one, whose inside may move.
for _model in (KAN, KANModel, SlimKAN):
    _model.__module__ = __name__
