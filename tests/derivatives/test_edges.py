# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from functools import partial

import pytest
import torch

from peft_lotra.derivatives import bases as functions
from peft_lotra.derivatives.bases import FunctionBasis
from peft_lotra.derivatives.edges import FunctionEdges, SplineEdges, taylor
from peft_lotra.kan import KANLinear
from peft_lotra.kan.basis import bspline_basis


@pytest.mark.parametrize("degree", [3, 5])
def test_taylor_is_the_polynomial_about_another_point(degree):
    coefficients, t = torch.randn(degree + 1, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found, s = taylor(coefficients, t, degree), 0.3
    value = sum(part * (t + s) ** q for q, part in enumerate(coefficients))
    torch.testing.assert_close(sum(part * s**d for d, part in enumerate(found)), value)
    assert len(taylor(coefficients, t, 2)) == 3


def gradients(edges, basis, z, weight):
    """phi and its derivatives, and the gradients of their sums with random numbers, by hand and by autograd."""
    phi, kept = edges.evaluate(basis, z, weight)
    towards = [torch.randn_like(part) for part in phi[:3]]
    loss = sum((to * part).sum() for to, part in zip(towards, phi, strict=False))
    return phi, edges.gradient([part.detach() for part in kept], towards), *torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("order", [3, 4, 5])
def test_splines_on_a_grid(order):
    """Inside and outside of grids of their own."""
    layer = KANLinear(3, 2, 6, spline_order=order, dtype=torch.float64)
    layer.grid_bounds[1] = torch.tensor([-0.5, 0.7])
    z = (torch.rand(3, 200, dtype=torch.float64) * 2 - 1) * 3
    weight = torch.randn(2, 3 * (7 + order), dtype=torch.float64, requires_grad=True)
    phi, by_hand, expected = gradients(SplineEdges(order, 6 + order), layer.grid, z, weight)
    torch.testing.assert_close(by_hand, expected)
    splines, base = weight.view(2, 7 + order, 3).split([6 + order, 1], 1)
    for d, part in enumerate(phi):
        values = torch.einsum("oki,nik->oin", splines, bspline_basis(z.T, *layer.grid, derivative=d))
        silu = functions_of_silu(z)[d]
        torch.testing.assert_close(part, values + base.mT * silu, rtol=1e-8, atol=1e-8)


def functions_of_silu(z: torch.Tensor) -> list[torch.Tensor]:
    found, x = [], z.clone().requires_grad_()
    value = torch.nn.functional.silu(x)
    for _ in range(4):
        found.append(value.detach())
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return found


def test_functions_of_any_kind():
    centers = torch.linspace(-1, 1, 5, dtype=torch.float64)
    basis = FunctionBasis(5, partial(functions.gaussian_derivatives, centers, 0.4))
    z = torch.rand(3, 50, dtype=torch.float64) * 2 - 1
    weight = torch.randn(2, 15, dtype=torch.float64, requires_grad=True)
    phi, by_hand, expected = gradients(FunctionEdges(5), basis, z, weight)
    torch.testing.assert_close(by_hand, expected)
    for part, found in zip(phi, basis.evaluate(z, 3), strict=True):
        torch.testing.assert_close(part, torch.einsum("oki,kin->oin", weight.view(2, 5, 3), found))
