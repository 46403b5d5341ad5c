# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradgradcheck

from peft_lotra.kan import KANLinear, bspline_basis
from peft_lotra.kan.basis import UniformGrid
from peft_lotra.kan.product import spline_product


def case(order, grid_size, points, rank, dtype, in_features=7, out_features=9):
    """Points in and around grids of different ends, a weight, and an update of rank `rank` or none."""
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


def product(x, low, high, grid_size, order, weight, update):
    """The product with the sum of a weight and an update in factors, as layers compute it."""
    grid = UniformGrid(low, high, grid_size, order)
    if not update:
        return spline_product(x, grid, weight)
    left, right = update
    y = spline_product(x, grid, weight, right)
    return y[:, : len(weight)] + y[:, len(weight) :] @ left.T


def reference(x, low, high, grid_size, order, weight, update):
    """The sum as it is written, in double precision."""
    if update is not None:
        weight = weight + torch.einsum("or,rik->oik", *update)
    basis = bspline_basis(x.double(), low.double(), high.double(), grid_size, order)
    return torch.einsum("nik,oik->no", basis, weight.double())


def leaves(x, weight, update):
    return [x, weight, *(update or ())]


def assert_close(result, expected, tolerance):
    """Up to a share of the largest entry: slopes of float32 positions on fine grids are large, and so are errors."""
    assert result.shape == expected.shape
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1.0
    torch.testing.assert_close(result.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)


# None to many points, for the outputs and for each other; grids on both sides of where coefficients are gathered
@pytest.mark.parametrize("order, grid_size", [*itertools.product(range(1, 6), (5, 64)), (3, 1), (4, 1), (3, 40)])
@pytest.mark.parametrize("points, in_features", [(0, 7), (1, 7), (200, 7), (9, 40), (700, 40)])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_value_and_gradients(order, grid_size, points, in_features, rank, dtype, tolerance):
    x, *rest, weight, update = case(order, grid_size, points, rank, dtype, in_features)
    tensors = leaves(x, weight, update)
    if in_features == 40:  # of any strides
        tensors = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in tensors]
        assert not any(tensor.is_contiguous() for tensor in tensors)
    x, weight, *update = tensors
    arguments = x, *rest, weight, tuple(update) or None
    y, expected = product(*arguments), reference(*arguments)
    direction = torch.randn_like(y)
    gradients = torch.autograd.grad(y, tensors, direction, retain_graph=True)
    differentiable = torch.autograd.grad(y, tensors, direction, create_graph=True)
    true = torch.autograd.grad(expected, tensors, direction.double())
    assert y.dtype == dtype
    for result in [(y, expected), *zip(gradients, true, strict=True), *zip(differentiable, true, strict=True)]:
        assert_close(*result, tolerance)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,), (3,), (1, 2, 3)])
@pytest.mark.parametrize("grid_size", [5, 40])
def test_what_needs_no_gradient_gets_none(grid_size, frozen):
    arguments = case(3, grid_size, 3000, 2, torch.float32)
    tensors = leaves(arguments[0], *arguments[5:])
    expected = torch.autograd.grad(reference(*arguments).sum(), tensors)
    for index in frozen:
        tensors[index].requires_grad_(False)
    product(*arguments).sum().backward()
    for index, (tensor, gradient) in enumerate(zip(tensors, expected, strict=True)):
        if index in frozen:
            assert tensor.grad is None
        else:
            assert_close(tensor.grad, gradient, 1e-4)


def test_double_backward():
    x, *ends, weight, update = case(3, 4, 3, 2, torch.float64, in_features=2, out_features=3)
    assert gradgradcheck(lambda x, w, *update: product(x, *ends, w, update), leaves(x, weight, update))


def test_torch_func_and_forward_mode():
    x, *ends, weight, update = case(3, 5, 6, 2, torch.float64)
    x, weight, update = x.detach(), weight.detach(), tuple(part.detach() for part in update)

    def row(x):
        return product(x.unsqueeze(0), *ends, weight, update).squeeze(0)

    torch.testing.assert_close(torch.vmap(row)(x), reference(x, *ends, weight, update))
    jacobian = torch.vmap(torch.func.jacrev(row))(x)
    torch.testing.assert_close(torch.vmap(torch.func.jacfwd(row))(x), jacobian)
    twice = torch.vmap(torch.func.jacfwd(torch.func.jacfwd(row)))(x)
    expected = torch.vmap(torch.func.jacrev(torch.func.jacrev(row)))(x)
    assert expected.abs().max() > 1
    torch.testing.assert_close(twice, expected)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        y = product(torch.autograd.forward_ad.make_dual(x, tangent), *ends, weight, update)
        derivative = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(derivative, torch.einsum("noi,ni->no", jacobian, tangent))


@pytest.mark.parametrize("grid_size", [5, 40])
def test_several_gradients_at_once(grid_size):
    x, *ends, weight, update = case(3, grid_size, 3000, 2, torch.float32)
    tensors = leaves(x, weight, update)
    y = product(x, *ends, weight, update).sum(0)
    together = torch.autograd.grad(y, tensors, torch.eye(len(y)), retain_graph=True, is_grads_batched=True)
    for index, value in enumerate(y):
        apart = torch.autograd.grad(value, tensors, retain_graph=True)
        for gradients, gradient in zip(together, apart, strict=True):
            assert_close(gradients[index], gradient, 1e-4)


def test_nothing_of_the_size_of_the_basis_is_kept():
    layer, x = KANLinear(50, 40), torch.rand(3000, 50, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        layer(x)
    assert max(kept) <= max(x.numel(), layer.spline_weight.numel())
