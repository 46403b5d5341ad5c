# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from peft_lotra.kan import bspline_basis


ORDERS = [1, 2, 3, 4, 5]
GRIDS = [(-1.0, 1.0, 5), (0.0, 1.0, 1), (-3.0, 0.5, 8), (1000.0, 1001.0, 4), (-1e-3, 2e-3, 3)]

orders = st.sampled_from(ORDERS)
grid_sizes = st.integers(1, 12)
grids = st.tuples(st.floats(-100, 100), st.floats(0.01, 100)).map(lambda pair: (pair[0], pair[0] + pair[1]))
seeds = st.integers(0, 2**31)


def scipy_basis(x, low, high, grid_size, spline_order):
    """The same basis from scipy's Cox-de Boor recursion, in float64; zero outside each support."""
    step = (high - low) / grid_size
    knots = low + step * np.arange(-spline_order, grid_size + spline_order + 1)
    columns = [
        BSpline.basis_element(knots[j : j + spline_order + 2], extrapolate=False)(x)
        for j in range(grid_size + spline_order)
    ]
    return np.nan_to_num(np.stack(columns, axis=-1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("low, high, grid_size", [(-1.0, 1.0, 5), (0.0, 1.0, 1), (-3.0, 0.5, 8)])
def test_derivative_argument_equals_scipy(order, low, high, grid_size):
    step = (high - low) / grid_size
    knots = low + step * np.arange(-order, grid_size + order + 1)
    x = torch.linspace(low + 1e-3, high - 2e-3, 97, dtype=torch.float64)  # no knot among them
    for derivative in range(order + 2):
        ours = bspline_basis(x, low, high, grid_size, order, derivative=derivative).numpy()
        reference = np.zeros_like(ours)
        for j, unit in enumerate(np.eye(grid_size + order)):
            if derivative <= order:
                reference[:, j] = BSpline(knots, unit, order).derivative(derivative)(x.numpy())
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-11 * max(1, abs(reference).max()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("low, high, grid_size", GRIDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_scipy(order, low, high, grid_size, dtype, tolerance):
    low, high = torch.tensor([low, high], dtype=dtype).tolist()  # as the dtype sees them
    width = high - low
    x = torch.linspace(low - 0.7 * width, high + 0.7 * width, 1001, dtype=dtype)
    ours = bspline_basis(x, low, high, grid_size, order)
    reference = scipy_basis(x.double().numpy(), low, high, grid_size, order)
    if low == 1000.0 and dtype == torch.float64:
        tolerance = 1e-11  # scipy's knots are themselves rounded at 1000
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.double().numpy(), reference, rtol=0, atol=tolerance)


@given(orders, grid_sizes, grids, seeds)
@settings(max_examples=50, deadline=None)
def test_sums_to_one_inside_and_is_zero_outside(order, grid_size, grid, seed):
    low, high = grid
    step = (high - low) / grid_size
    share = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    inside = bspline_basis(low + share * (high - low), low, high, grid_size, order)
    assert (inside >= 0).all()
    torch.testing.assert_close(inside.sum(-1), torch.ones_like(share), rtol=0, atol=1e-10)

    beyond = torch.cat([low - (order + share + 1e-6) * step, high + (order + share + 1e-6) * step])
    assert (bspline_basis(beyond, low, high, grid_size, order) == 0).all()


@given(orders, st.sampled_from([(), (3,), (0,), (2, 1, 3)]), seeds)
@settings(max_examples=30, deadline=None)
def test_leading_shapes_and_a_grid_for_each_input(order, leading, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, 4, generator=generator)
    low = torch.randn(4, generator=generator)
    high = low + 1 + torch.rand(4, generator=generator)
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
    second = torch.func.vmap(torch.func.hessian(lambda point: bspline_basis(point, -1.0, 1.0, 5, 3)))(x[:, 0])
    torch.testing.assert_close(second, bspline_basis(x[:, 0], -1.0, 1.0, 5, 3, derivative=2))
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


@pytest.mark.parametrize("order", [0, 6, 2.0, "3"])
def test_refuses_an_order(order):
    with pytest.raises(ValueError, match="`spline_order` is"):
        bspline_basis(torch.zeros(1), -1, 1, 5, order)


def test_refuses_other_arguments():
    for grid_size in (0, -1, 2.5):
        with pytest.raises(ValueError, match="`grid_size` is .* at least 1"):
            bspline_basis(torch.zeros(1), -1, 1, grid_size, 3)
    for derivative in (-1, 0.5, None):
        with pytest.raises(ValueError, match="`derivative` is"):
            bspline_basis(torch.zeros(3), -1, 1, 5, 3, derivative=derivative)
    with pytest.raises(TypeError, match="int64"):
        bspline_basis(torch.zeros(1, dtype=torch.int64), -1, 1, 5, 3)
