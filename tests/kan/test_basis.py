# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from peft_lotra.kan import bspline_basis


ORDERS = [1, 2, 3, 4, 5]
GRIDS = [(-1.0, 1.0, 5), (0.0, 1.0, 1), (-3.0, 0.5, 8), (1000.0, 1001.0, 4), (-1e-3, 2e-3, 3)]


def scipy_basis(x, low, high, grid_size, order, derivative=0):
    """The same basis from scipy's Cox-de Boor recursion, in float64; zero outside each support."""
    step = (high - low) / grid_size
    knots = low + step * np.arange(-order, grid_size + order + 1)
    elements = [BSpline.basis_element(knots[j : j + order + 2], extrapolate=False) for j in range(grid_size + order)]
    if derivative > order:
        return np.zeros((len(x), len(elements)))
    return np.nan_to_num(np.stack([element.derivative(derivative)(x) for element in elements], axis=-1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("low, high, grid_size", GRIDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_equals_scipy(order, low, high, grid_size, dtype, tolerance):
    low, high = torch.tensor([low, high], dtype=dtype).tolist()  # as the dtype sees them
    beyond = (0.7 + order / grid_size) * (high - low)  # and beyond all supports
    x = torch.linspace(low - beyond, high + beyond, 1001, dtype=dtype)
    ours = bspline_basis(x, low, high, grid_size, order)
    assert ours.dtype == dtype and (ours >= 0).all() and not ours[[0, -1]].any()
    for derivative in range(order + 2 if dtype == torch.float64 and high < 1000 else 1):
        if derivative:
            x = low + (high - low) * torch.linspace(0.0007, 0.9986, 101, dtype=dtype)  # no knot among them
        ours = bspline_basis(x, low, high, grid_size, order, derivative=derivative).double().numpy()
        reference = scipy_basis(x.double().numpy(), low, high, grid_size, order, derivative)
        np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * max(1, abs(reference).max()))


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 1, 3)])
@pytest.mark.parametrize("order", ORDERS)
def test_leading_shapes_and_a_grid_for_each_input(order, leading):
    x, low = torch.randn(*leading, 4), torch.randn(4)
    high = low + 1 + torch.rand(4)
    basis = bspline_basis(x, low, high, 5, order)
    assert basis.shape == (*leading, 4, 5 + order)
    for i in range(4):
        torch.testing.assert_close(basis[..., i, :], bspline_basis(x[..., i], low[i], high[i], 5, order))


@pytest.mark.parametrize("order", ORDERS)
def test_gradients(order):
    # No point on a knot, where splines of low order have a kink.
    x = (torch.linspace(-1.9, 1.9, 13, dtype=torch.float64) + 0.0123).requires_grad_()
    low = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    high = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def basis(x, low, high):
        return bspline_basis(x, low, high, 4, order)

    assert torch.autograd.gradcheck(basis, (x, low, high))
    if order >= 3:
        assert torch.autograd.gradgradcheck(basis, (x, low, high))


def test_function_transforms_and_compiled_graphs_agree():
    x = torch.randn(7, 3, dtype=torch.float64)
    low = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)

    def basis(x):
        return bspline_basis(x, low, low + 2, 5, 3)

    torch.testing.assert_close(torch.func.vmap(basis)(x), basis(x))
    at = torch.cat([x[:, 0], torch.linspace(-1, 1, 9, dtype=torch.float64)])  # and at knots
    second = torch.func.vmap(torch.func.hessian(lambda point: bspline_basis(point, -1.0, 1.0, 4, 3)))(at)
    torch.testing.assert_close(second, bspline_basis(at, -1.0, 1.0, 4, 3, derivative=2))
    value, tangent = torch.func.jvp(basis, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, basis(x))
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(basis, x, torch.ones_like(x))[1])
    # One grid for each member of an ensemble.
    many = torch.func.vmap(lambda low: bspline_basis(x, low, low + 2, 5, 3))(torch.stack([low, low + 0.1]))
    torch.testing.assert_close(many[1], bspline_basis(x, low + 0.1, low + 2.1, 5, 3))
    torch._dynamo.reset()
    compiled = torch.compile(basis, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), basis(x))
    gradients = [torch.autograd.grad(f(y).square().sum(), y) for f in (compiled, basis) for y in [x.requires_grad_()]]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_evaluated_in_float32(dtype):
    x = torch.randn(100).to(dtype)
    basis = bspline_basis(x, -1.0, 1.0, 5, 3)
    assert basis.dtype == dtype
    assert torch.equal(basis, bspline_basis(x.float(), -1.0, 1.0, 5, 3).to(dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_infinite_and_nan_points(order):
    x = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).max, torch.nan, 0.1], requires_grad=True)
    basis = bspline_basis(x, -1.0, 1.0, 5, order)
    (gradient,) = torch.autograd.grad((basis * torch.arange(5.0 + order)).sum(), x)
    assert (basis[:3] == 0).all() and (gradient[:3] == 0).all()
    assert basis[3].isnan().all()
    assert basis[4].isfinite().all() and gradient[4].isfinite()


WRONG = [("spline_order", order) for order in (0, 6, 2.0, "3")] + [("grid_size", size) for size in (0, -1, 2.5)]
WRONG += [("derivative", derivative) for derivative in (-1, 0.5, None)] + [("x", torch.zeros(1, dtype=torch.int64))]


@pytest.mark.parametrize("name, value", WRONG)
def test_refuses_arguments(name, value):
    arguments = {"x": torch.zeros(3), "low": -1, "high": 1, "grid_size": 5, "spline_order": 3, name: value}
    with pytest.raises((ValueError, TypeError), match=f"`{name}` (is|has)"):
        bspline_basis(**arguments)
