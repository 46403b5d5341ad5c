# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A small PDE by least squares, as tests of several files solve it."""

import math

import torch

from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares.problem import LeastSquares, check_terms


def fit(model, x, y):
    return model(x) - y


def equation(model, x, f):
    u, _, laplacian = jet(model, x, collapse=True)
    return -laplacian + u**3 - f


def network(width=5, dtype=torch.float64):
    return KAN([2, width, width, 1], dtype=dtype)


def terms(dtype=torch.float64, points=150):
    """-lap u + u^3 = f with the solution sin(pi x) sin(pi y)."""
    x = torch.rand(points, 2, dtype=dtype) * 2 - 1
    u = (math.pi * x).sin().prod(1, keepdim=True)
    line = torch.linspace(-1, 1, 10, dtype=dtype)
    ends = torch.ones_like(line)
    edge = torch.cat([torch.stack(side, 1) for v in (ends, -ends) for side in ((line, v), (v, line))])
    return [(equation, (x, 2 * math.pi**2 * u + u**3), 1.0), (fit, (edge, torch.zeros_like(edge[:, :1])), 50.0)]


def problem(model, residual_terms, memory=2**30):
    return LeastSquares(model, check_terms(residual_terms), memory, {})
