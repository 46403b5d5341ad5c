# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The derivatives of basis functions, beside those by autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from jet_helpers import assert_same
from torch import Tensor

from peft_lotra.derivatives import bases as functions
from peft_lotra.kan import bspline_basis
from peft_lotra.kan.formula import FunctionBasis


KNOTS = torch.cat([torch.linspace(-1, 1, 12), torch.tensor([1.0, 1.0])]).double().pow(3).repeat(3, 1)
CENTERS = torch.linspace(-1, 1, 5, dtype=torch.float64)
CASES = {
    "splines, knots that coincide": partial(functions.spline_derivatives, KNOTS, 3),
    "quadratic splines": partial(functions.spline_derivatives, KNOTS, 2),
    "quintic splines": partial(functions.spline_derivatives, KNOTS, 5),
    "gaussians": partial(functions.gaussian_derivatives, CENTERS, 0.4),
    "bumps": partial(functions.bump_derivatives, CENTERS),
    "chebyshev": partial(functions.chebyshev_derivatives, 6),
    "constant": partial(functions.chebyshev_derivatives, 0),
    "harmonics": partial(functions.harmonic_derivatives, 4),
}


def points() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(7, 3, dtype=torch.float64, generator=generator) * 2.2 - 1.1


@pytest.mark.parametrize("name", CASES)
def test_each_derivative_is_that_of_the_one_before(name):
    z = points().requires_grad_()
    found = CASES[name](z, 5)
    assert [len(CASES[name](z, highest)) for highest in range(6)] == [1, 2, 3, 4, 5, 6]
    for lower, higher in zip(found, found[1:], strict=False):
        assert lower.shape == higher.shape == (7, 3, lower.shape[-1])
        for k in range(lower.shape[-1]):
            slope = torch.zeros_like(z)
            if lower.requires_grad:
                (slope,) = torch.autograd.grad(
                    lower[..., k].sum(), z, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            torch.testing.assert_close(higher[..., k], slope, rtol=1e-9, atol=1e-9)


def test_values_of_splines():
    z, order, size = points(), 3, 6
    step = 2 / size
    knots = -1 + step * torch.arange(-order, size + order + 1, dtype=torch.float64).repeat(3, 1)
    for d, found in enumerate(functions.spline_derivatives(knots, order, z, 3)):
        torch.testing.assert_close(found, bspline_basis(z, -1, 1, size, order, derivative=d), rtol=1e-10, atol=1e-9)
    clamped = torch.tensor([-1.0] * 4 + [0.0] + [1.0] * 4, dtype=torch.float64).repeat(3, 1)
    end = torch.ones(1, 3, dtype=torch.float64)
    assert not functions.spline_derivatives(clamped, 3, end, 0)[0].any()
    last = functions.spline_derivatives(clamped, 3, end, 0, torch.full((3,), 4))[0]  # the right end belongs to it
    assert torch.equal(last, torch.eye(5, dtype=torch.float64)[4].expand(1, 3, 5))


@pytest.mark.parametrize("given", [3, 4])
def test_derivatives_that_are_not_given_are_found(given):
    """As by users, who give what a residual of second order takes."""
    every = CASES["quintic splines"]
    basis, z = FunctionBasis(8, every), points().T
    few = basis._replace(derivatives=lambda z, highest: every(z, highest)[:given])
    for highest in (1, 5):
        assert_same(functions.evaluate_functions(few, z, highest), functions.evaluate_functions(basis, z, highest))


def test_gaussians_far_away():
    z = torch.tensor([[1e19], [0.0]], dtype=torch.float32)
    for part in functions.gaussian_derivatives(CENTERS.float(), 0.4, z, 2):
        assert not part[0].any() and part[1].isfinite().all()
