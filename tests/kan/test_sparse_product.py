# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.kan import bspline_basis
from peft_lotra.kan.sparse_product import Points, is_sparse, sparse_gradients, sparse_product


def points(order: int, rows: int = 100, grid_size: int = 40, dtype: torch.dtype = torch.float32) -> Points:
    """In and around grids of different ends."""
    low, high = torch.tensor([-1.0, -0.5, 0.0], dtype=dtype), torch.tensor([1.0, 0.5, 0.1], dtype=dtype)
    x = low + (high - low) * (3 * torch.rand(rows, 3, dtype=dtype) - 1)
    return Points(x, low, grid_size / (high - low), grid_size + order, order)


def test_positions_count_grid_intervals():
    points = Points(torch.tensor([[0.0, 0.5]]), torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 4.0]), 8, 3)
    assert points.position.tolist() == [[2.0, 2.0]]


def test_large_grids_and_many_points_are_sparse():
    assert is_sparse(points(3))
    for other in (points(3, grid_size=5), points(3, rows=10), points(3, dtype=torch.float64)):
        assert not is_sparse(other)


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("rank", [0, 2])
def test_product_and_gradients_are_those_of_the_whole_basis(order, rank):
    p = points(order, dtype=torch.float64)
    x, weight = p.x.requires_grad_(), torch.randn(4, 3, p.num_basis, dtype=torch.float64, requires_grad=True)
    update = None
    if rank:
        shapes = (4, rank), (rank, 3, p.num_basis)
        left, right = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
        update = left, right
    total = weight if update is None else weight + torch.einsum("or,rik->oik", *update)
    expected = torch.einsum("nik,oik->no", bspline_basis(x, p.low, p.low + 40 / p.scale, 40, order), total)
    gradient = torch.randn_like(expected)
    with torch.no_grad():
        torch.testing.assert_close(sparse_product(p, weight, update), expected)
        found = sparse_gradients(p, weight, update, gradient, [True] * 4)
        none = sparse_gradients(p, weight, update, gradient, [False] * 4)
    tensors = [x, weight, *(update or ())]
    for a, e in zip(found, torch.autograd.grad(expected, tensors, gradient), strict=False):
        torch.testing.assert_close(a, e)
    assert none == (None,) * 4 and (rank or found[2:] == (None, None))
