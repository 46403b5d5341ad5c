# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import itertools

import pytest
import torch

from peft_lotra.kan import KANLinear, bspline_basis
from peft_lotra.kan.basis import UniformGrid
from peft_lotra.kan.product import spline_product


def case(order, grid_size, points, rank, dtype, in_features=7, out_features=9):
    """Return points in and around different grids, a weight, and an update of rank `rank` or None."""
    generator = torch.Generator().manual_seed(order + 10 * grid_size + points)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = (3 * rand(points, in_features) - 1.5).requires_grad_()
    low, high = -rand(in_features) - 0.5, rand(in_features) + 0.5
    weight = (rand(out_features, in_features, grid_size + order) - 0.5).requires_grad_()
    update = None
    if rank:
        left, right = rand(out_features, rank) - 0.5, rand(rank, in_features, grid_size + order) - 0.5
        update = left.requires_grad_(), right.requires_grad_()
    return x, low, high, grid_size, order, weight, update


def compute_product(x, low, high, grid_size, order, weight, update):
    """Multiply by the sum of a weight and an update in factors, as layers do."""
    grid = UniformGrid(low, high, grid_size, order)
    if not update:
        return spline_product(x, grid, weight)
    left, right = update
    y = spline_product(x, grid, weight, right)
    return y[:, : len(weight)] + y[:, len(weight) :] @ left.T


def reference(x, low, high, grid_size, order, weight, update):
    """Evaluate the formula in double precision."""
    if update is not None:
        weight = weight + torch.einsum("or,rik->oik", *update)
    basis = bspline_basis(x.double(), low.double(), high.double(), grid_size, order)
    return torch.einsum("nik,oik->no", basis, weight.double())


def leaves(x, weight, update):
    return [x, weight, *(update or ())]


def assert_close(result, expected, tolerance):
    """Compare up to a share of the largest entry: slopes on fine grids are large, and so are their errors."""
    assert result.shape == expected.shape
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1.0
    torch.testing.assert_close(result.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)


# no points to many, on small and large grids
@pytest.mark.parametrize("order, grid_size", [*itertools.product(range(1, 6), (5, 64)), (3, 1), (4, 1), (3, 40)])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "points, in_features, dtype, tolerance",
    [
        (0, 7, torch.float64, 1e-12),
        (1, 7, torch.float64, 1e-12),
        (200, 7, torch.float64, 1e-12),
        (9, 40, torch.float64, 1e-12),
        (700, 40, torch.float64, 1e-12),
        (1, 7, torch.float32, 1e-4),
        (700, 40, torch.float32, 1e-4),
    ],
)
def test_the_value_and_the_gradients_are_those_of_the_sum(
    order, grid_size, rank, points, in_features, dtype, tolerance
):
    x, *grid, weight, update = case(order, grid_size, points, rank, dtype, in_features)
    tensors = leaves(x, weight, update)
    if in_features == 40:
        tensors = [transposed(tensor) for tensor in tensors]
    x, weight, *update = tensors
    arguments = x, *grid, weight, tuple(update) or None
    expected = reference(*arguments)
    direction = torch.randn(expected.shape, dtype=dtype)
    expected_gradients = torch.autograd.grad(expected, tensors, direction.double())

    y = compute_product(*arguments)
    gradients = torch.autograd.grad(y, tensors, direction, retain_graph=True)
    differentiable_gradients = torch.autograd.grad(y, tensors, direction, create_graph=True)

    assert y.dtype == dtype
    assert_close(y, expected, tolerance)
    for pair in zip(gradients + differentiable_gradients, 2 * expected_gradients, strict=True):
        assert_close(*pair, tolerance)


def transposed(tensor):
    """Return the tensor with other strides."""
    strided = tensor.detach().mT.contiguous().mT.requires_grad_()
    assert not strided.is_contiguous()
    return strided


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,), (3,), (1, 2, 3)])
@pytest.mark.parametrize("grid_size", [5, 40])
def test_what_needs_no_gradient_gets_none(grid_size, frozen):
    arguments = case(3, grid_size, 3000, 2, torch.float32)
    tensors = leaves(arguments[0], *arguments[5:])
    expected = torch.autograd.grad(reference(*arguments).sum(), tensors)
    for index in frozen:
        tensors[index].requires_grad_(False)

    compute_product(*arguments).sum().backward()

    for index, (tensor, gradient) in enumerate(zip(tensors, expected, strict=True)):
        if index in frozen:
            assert tensor.grad is None
        else:
            assert_close(tensor.grad, gradient, 1e-4)


@pytest.fixture
def product():
    """Points, and the product as a function of them."""
    x, *grid, weight, update = case(3, 5, 6, 2, torch.float64)
    arguments = *grid, weight.detach(), tuple(factor.detach() for factor in update)
    return x.detach(), lambda x: compute_product(x, *arguments)


def test_dual_numbers_have_the_slope_along_the_tangent(product):
    x, function = product
    tangent = torch.randn_like(x)
    _, expected = torch.autograd.functional.jvp(function, x, tangent)

    with torch.autograd.forward_ad.dual_level():
        y = function(torch.autograd.forward_ad.make_dual(x, tangent))
        slope = torch.autograd.forward_ad.unpack_dual(y).tangent

    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("grid_size", [5, 40])
def test_several_gradients_at_once(grid_size):
    x, *grid, weight, update = case(3, grid_size, 3000, 2, torch.float32)
    tensors = leaves(x, weight, update)
    y = compute_product(x, *grid, weight, update).sum(0)

    batched = torch.autograd.grad(y, tensors, torch.eye(len(y)), retain_graph=True, is_grads_batched=True)

    for index, value in enumerate(y):
        expected = torch.autograd.grad(value, tensors, retain_graph=True)
        for gradients, gradient in zip(batched, expected, strict=True):
            assert_close(gradients[index], gradient, 1e-4)


def test_nothing_of_the_size_of_the_basis_is_saved_for_the_backward_pass():
    layer, x = KANLinear(50, 40), torch.rand(3000, 50, requires_grad=True)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)

    assert max(sizes) <= max(x.numel(), layer.spline_weight.numel())
