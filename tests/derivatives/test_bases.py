# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The derivatives of basis functions, compared with autograd."""

import itertools
from functools import partial

import pytest
import torch
from jet_helpers import assert_same

from peft_lotra.derivatives import bases as functions
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


def points():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(7, 3, dtype=torch.float64, generator=generator) * 2.2 - 1.1


def slopes(values, z):
    """Return the derivative of each function (..., functions) at its own point."""
    if not values.requires_grad:
        return torch.zeros_like(values)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.stack([torch.autograd.grad(column.sum(), z, **options)[0] for column in values.unbind(-1)], -1)


@pytest.mark.parametrize("name", CASES)
def test_each_derivative_is_the_slope_of_the_previous_one(name):
    z = points().requires_grad_()

    derivatives = CASES[name](z, 5)

    assert len(derivatives) == 6
    assert len(CASES[name](z, 0)) == 1
    for lower, higher in itertools.pairwise(derivatives):
        assert lower.shape[:2] == (7, 3)
        torch.testing.assert_close(higher, slopes(lower, z), rtol=1e-9, atol=1e-9)


def test_the_right_end_belongs_to_the_interval_that_is_said_to_be_the_last():
    knots = torch.tensor([-1.0] * 4 + [0.0] + [1.0] * 4, dtype=torch.float64).repeat(3, 1)
    end = torch.ones(1, 3, dtype=torch.float64)

    (outside,) = functions.spline_derivatives(knots, 3, end, 0)
    (inside,) = functions.spline_derivatives(knots, 3, end, 0, torch.full((3,), 4))

    assert not outside.any()
    assert torch.equal(inside, torch.eye(5, dtype=torch.float64)[4].expand(1, 3, 5))


@pytest.mark.parametrize("highest", [1, 5])
@pytest.mark.parametrize("count", [3, 4])
def test_derivatives_that_a_user_leaves_out_are_computed(count, highest):
    """Users give the derivatives that a residual of second order needs."""
    derivatives = CASES["quintic splines"]
    full = FunctionBasis(8, derivatives)
    short = FunctionBasis(8, lambda z, highest: derivatives(z, highest)[:count])
    z = points().T

    values = functions.evaluate_functions(short, z, highest)

    assert_same(values, functions.evaluate_functions(full, z, highest))


def test_gaussians_far_away_are_zero():
    z = torch.tensor([[1e19], [0.0]], dtype=torch.float32)

    for derivative in functions.gaussian_derivatives(CENTERS.float(), 0.4, z, 2):
        assert not derivative[0].any()
        assert derivative[1].isfinite().all()
