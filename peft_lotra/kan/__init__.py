# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Kolmogorov-Arnold networks of B-splines, dense and Slim, with their derivatives."""

from __future__ import annotations

from .basis import bspline_basis
from .input_map import TanhBound
from .layer import KANLinear
from .network import KAN
from .refinement import refine_grid
from .slim_kan import SlimKAN, SlimKANLinear


from ..derivatives.api import hessian, jet, laplacian  # isort: skip (it imports the files above)

__all__ = [
    "KAN",
    "KANLinear",
    "SlimKAN",
    "SlimKANLinear",
    "TanhBound",
    "bspline_basis",
    "hessian",
    "jet",
    "laplacian",
    "refine_grid",
]


# Files of adapters name the module of the base's class: the public one, whose inside may move.
for _model in (KAN, SlimKAN):
    _model.__module__ = __name__
