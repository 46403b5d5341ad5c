# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch.testing import assert_close

from peft_lotra.kan import bspline_basis


ORDERS = [1, 2, 3, 4, 5]
GRIDS = [(-1.0, 1.0, 5), (0.0, 1.0, 1), (-3.0, 0.5, 8), (1000.0, 1001.0, 4), (-1e-3, 2e-3, 3)]


def scipy_basis(x, low, high, grid_size, order, derivative=0):
    """Return the basis from scipy's Cox-de Boor recursion, in float64; zero outside each support."""
    step = (high - low) / grid_size
    knots = low + step * np.arange(-order, grid_size + order + 1)
    elements = [BSpline.basis_element(knots[j : j + order + 2], extrapolate=False) for j in range(grid_size + order)]
    if derivative > order:
        return np.zeros((len(x), len(elements)))
    return np.nan_to_num(np.stack([element.derivative(derivative)(x) for element in elements], axis=-1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("low, high, grid_size", GRIDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_values_equal_scipy_on_the_grid_and_far_from_it(order, low, high, grid_size, dtype, tolerance):
    low, high = torch.tensor([low, high], dtype=dtype).tolist()  # rounded to the dtype
    beyond = (0.7 + order / grid_size) * (high - low)
    x = torch.linspace(low - beyond, high + beyond, 1001, dtype=dtype)

    basis = bspline_basis(x, low, high, grid_size, order)

    assert basis.dtype == dtype
    assert (basis >= 0).all()
    assert not basis[[0, -1]].any()  # beyond all supports
    expected = scipy_basis(x.double().numpy(), low, high, grid_size, order)
    np.testing.assert_allclose(basis.double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("low, high, grid_size", [grid for grid in GRIDS if grid[1] < 1000])
def test_derivatives_equal_scipy(order, low, high, grid_size):
    between_knots = torch.linspace(0.0007, 0.9986, 101, dtype=torch.float64)
    x = low + (high - low) * between_knots

    for derivative in range(1, order + 2):
        basis = bspline_basis(x, low, high, grid_size, order, derivative=derivative)
        expected = scipy_basis(x.numpy(), low, high, grid_size, order, derivative)
        largest = max(1, abs(expected).max())
        np.testing.assert_allclose(basis.numpy(), expected, rtol=0, atol=1e-11 * largest)


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 1, 3)])
@pytest.mark.parametrize("order", ORDERS)
def test_leading_shapes_and_a_grid_for_each_input(order, leading):
    x, low = torch.randn(*leading, 4), torch.randn(4)
    high = low + 1 + torch.rand(4)

    basis = bspline_basis(x, low, high, 5, order)

    assert basis.shape == (*leading, 4, 5 + order)
    for i in range(4):
        assert_close(basis[..., i, :], bspline_basis(x[..., i], low[i], high[i], 5, order))


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_points_and_ends_are_right(order):
    # no point is on a knot, where splines of low order have a kink
    x = (torch.linspace(-1.9, 1.9, 13, dtype=torch.float64) + 0.0123).requires_grad_()
    low = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    high = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def basis(x, low, high):
        return bspline_basis(x, low, high, 4, order)

    assert torch.autograd.gradcheck(basis, (x, low, high))
    if order >= 3:
        assert torch.autograd.gradgradcheck(basis, (x, low, high))


LOW = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)


def on_three_grids(x, low=LOW):
    return bspline_basis(x, low, low + 2, 5, 3)


def random_rows():
    return torch.randn(7, 3, dtype=torch.float64)


def test_vmap_of_rows_and_of_grids():
    x = random_rows()
    lows = torch.stack([LOW, LOW + 0.1])

    by_grid = torch.func.vmap(lambda low: on_three_grids(x, low))(lows)

    assert_close(torch.func.vmap(on_three_grids)(x), on_three_grids(x))
    assert_close(by_grid[1], on_three_grids(x, LOW + 0.1))


def test_transforms_have_the_derivatives_also_at_knots():
    x = random_rows()
    points = torch.cat([x[:, 0], torch.linspace(-1, 1, 9, dtype=torch.float64)])

    second = torch.func.vmap(torch.func.hessian(lambda point: bspline_basis(point, -1.0, 1.0, 4, 3)))(points)
    value, tangent = torch.func.jvp(on_three_grids, (x,), (torch.ones_like(x),))

    assert_close(second, bspline_basis(points, -1.0, 1.0, 4, 3, derivative=2))
    assert_close(value, on_three_grids(x))
    assert_close(tangent, torch.autograd.functional.jvp(on_three_grids, x, torch.ones_like(x))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_evaluated_in_float32(dtype):
    x = torch.randn(100).to(dtype)

    basis = bspline_basis(x, -1.0, 1.0, 5, 3)

    assert basis.dtype == dtype
    assert torch.equal(basis, bspline_basis(x.float(), -1.0, 1.0, 5, 3).to(dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_infinite_points_have_zeros_and_nan_stays(order):
    x = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).max, torch.nan, 0.1], requires_grad=True)

    basis = bspline_basis(x, -1.0, 1.0, 5, order)
    (gradient,) = torch.autograd.grad((basis * torch.arange(5.0 + order)).sum(), x)

    assert (basis[:3] == 0).all()
    assert (gradient[:3] == 0).all()
    assert basis[3].isnan().all()
    assert basis[4].isfinite().all()
    assert gradient[4].isfinite()


WRONG = [("spline_order", order) for order in (0, 6, 2.0, "3")] + [("grid_size", size) for size in (0, -1, 2.5)]
WRONG += [("derivative", derivative) for derivative in (-1, 0.5, None)] + [("x", torch.zeros(1, dtype=torch.int64))]


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_arguments_are_refused(name, value):
    arguments = {"x": torch.zeros(3), "low": -1, "high": 1, "grid_size": 5, "spline_order": 3, name: value}
    with pytest.raises((ValueError, TypeError), match=f"`{name}` (is|has)"):
        bspline_basis(**arguments)
