# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Equations that tests of several files of `pde` solve, and the errors of their solutions."""

import torch

from peft_lotra.kan import jet
from peft_lotra.pde import box_points


def poisson(model, x):
    return jet(model, x, collapse=True)[2] + 1


def by_autograd(model, x):
    """Differentiate on a line at points that require a gradient, as PINNs are written."""
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.autograd.grad(du.sum(), x, create_graph=True)[0] + 1


def line(x):
    return x * (10 - x)


def error(result, exact):
    """Return the relative error of a solution."""
    x = box_points(result.low.tolist(), result.high.tolist(), 500, inside=result.inside, seed=5)
    return ((result.model(x) - exact(x)).norm() / exact(x).norm()).item()
