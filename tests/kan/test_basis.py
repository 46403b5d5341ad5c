# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qkan.kan import KANLinear as EfficientKANLinear
from scipy.interpolate import BSpline

from peft_lotra.kan import bspline_basis
from peft_lotra.kan.basis import TruncatedPowers, cardinal_derivatives, cardinal_spline, integer_power, moments


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


@pytest.mark.parametrize("derivative", [-1, 0.5, None])
def test_derivative_out_of_range(derivative):
    with pytest.raises(ValueError, match="`derivative` is"):
        bspline_basis(torch.zeros(3), -1, 1, 5, 3, derivative=derivative)


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


@pytest.mark.parametrize("order", ORDERS)
def test_equals_efficient_kan_inside_the_grid(order):
    layer = EfficientKANLinear(4, 1, grid_size=6, spline_order=order, grid_range=[-2, 1])
    x = torch.rand(200, 4) * 2.99 - 1.995
    torch.testing.assert_close(bspline_basis(x, -2, 1, 6, order), layer.b_splines(x), rtol=0, atol=5e-6)


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


@given(orders, grid_sizes, seeds)
@settings(max_examples=30, deadline=None)
def test_each_function_is_zero_outside_its_own_support(order, grid_size, seed):
    x = torch.rand(64, generator=torch.Generator().manual_seed(seed)) * grid_size
    index = torch.arange(grid_size + order)
    outside = (x[:, None] < index - order) | (x[:, None] > index + 1)
    assert (bspline_basis(x, 0.0, float(grid_size), grid_size, order)[outside] == 0).all()


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


@pytest.mark.parametrize("order", ORDERS)
def test_derivatives_equal_scipy(order):
    x = torch.linspace(-1.4, 1.4, 101, dtype=torch.float64) + 1e-3
    step = 2 / 5
    knots = -1 + step * np.arange(-order, 5 + order + 1)
    first = torch.func.vmap(torch.func.jacfwd(lambda point: bspline_basis(point, -1.0, 1.0, 5, order)))(x)
    second = torch.func.vmap(torch.func.hessian(lambda point: bspline_basis(point, -1.0, 1.0, 5, order)))(x)
    for ours, degree in ((first, 1), (second, 2)):
        if degree > order:
            assert (ours == 0).all()
            continue
        for j in range(5 + order):
            element = BSpline.basis_element(knots[j : j + order + 2], extrapolate=False)
            reference = np.nan_to_num(element.derivative(degree)(x.numpy()))
            np.testing.assert_allclose(ours[:, j].numpy(), reference, rtol=0, atol=1e-10)


def test_function_transforms_agree():
    x = torch.randn(7, 3, dtype=torch.float64)
    low = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)

    def basis(x):
        return bspline_basis(x, low, low + 2, 5, 3)

    torch.testing.assert_close(torch.func.vmap(basis)(x), basis(x))
    value, tangent = torch.func.jvp(basis, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, basis(x))
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(basis, x, torch.ones_like(x))[1])
    # One grid for each member of an ensemble.
    many = torch.func.vmap(lambda low: bspline_basis(x, low, low + 2, 5, 3))(torch.stack([low, low + 0.1]))
    torch.testing.assert_close(many[1], bspline_basis(x, low + 0.1, low + 2.1, 5, 3))


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(bspline_basis, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(compiled(x, -1.0, 1.0, 5, 3), bspline_basis(x, -1.0, 1.0, 5, 3))
    (gradient,) = torch.autograd.grad(compiled(x, -1.0, 1.0, 5, 3).square().sum(), x)
    (expected,) = torch.autograd.grad(bspline_basis(x, -1.0, 1.0, 5, 3).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


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
    with pytest.raises(ValueError, match="`spline_order` is .* must be an integer from 1 .* to 5"):
        bspline_basis(torch.zeros(1), -1, 1, 5, order)


@pytest.mark.parametrize("grid_size", [0, -1, 2.5])
def test_refuses_a_grid_size(grid_size):
    with pytest.raises(ValueError, match="`grid_size` is .* at least 1"):
        bspline_basis(torch.zeros(1), -1, 1, grid_size, 3)


def test_refuses_integers():
    with pytest.raises(TypeError, match="int64"):
        bspline_basis(torch.zeros(1, dtype=torch.int64), -1, 1, 5, 3)


@pytest.mark.parametrize("order", range(1, 6))
def test_cardinal_derivatives_share_powers(order):
    offset = torch.linspace(-4, 4, 161, dtype=torch.float64)
    for derivative, found in enumerate(cardinal_derivatives(offset, order)):
        torch.testing.assert_close(found, cardinal_spline(offset, order, derivative))


@pytest.mark.parametrize("power", range(6))
@pytest.mark.parametrize("in_place", [True, False])
def test_integer_powers(power, in_place):
    x = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    expected = x**power if power else torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    out = x if in_place else torch.empty_like(x)
    assert integer_power(x, power, out=out) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("order", range(1, 6))
def test_truncated_powers_sum_to_the_cardinal_spline(order):
    powers = TruncatedPowers(order, 7, torch.empty(0, dtype=torch.float64))
    position = torch.linspace(-3, 10, 131, dtype=torch.float64)
    offsets = position * powers.unit - powers.centers[2]
    expected = cardinal_spline(position - 2 + (order - 1) / 2, order)
    others = [torch.empty_like(offsets) for _ in powers.factors[1:]]
    distances = powers.distances(offsets.abs(), others)
    out = powers.sum_into(torch.empty_like(offsets), [t**order for t in distances])
    torch.testing.assert_close(out, expected)


def test_moments_are_means_over_a_normal_law():
    variance, found = moments((-1, 3), 4, 2)
    assert variance == 16 / 12 and found.shape == (7, 7)
    x = 1 + variance**0.5 * torch.randn(200_000, dtype=torch.float64)
    basis = bspline_basis(x, -1, 3, 4, 2)
    functions = torch.cat([basis, torch.nn.functional.silu(x).unsqueeze(-1)], dim=-1)
    torch.testing.assert_close(found, functions.T @ functions / len(x), rtol=0.05, atol=0.01)
