# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks of polynomials and waves."""

import math

import pytest
import torch

from peft_lotra.derivatives.torch_fallback import jet_by_transforms
from peft_lotra.kan import jet
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import BoxDistance, HardConstraint
from peft_lotra.pde.polynomials import grid_points, new_polynomials


@pytest.mark.parametrize(("order", "is_weighted"), [(1, False), (2, True), (3, False), (4, False), (4, True)])
def test_jets_of_polynomials_are_those_of_transforms(order, is_weighted):
    """Derivatives along axes and oblique directions are exact, also in weighted sums."""
    network = new_polynomials([0, 0, 1], [1, 2, 3], [1], [4, 5, 3], 2)
    torch.nn.init.normal_(network[1].weight)
    x = torch.rand(20, 3, dtype=torch.float64) + torch.tensor([0, 0, 1.0])
    directions = torch.cat([torch.eye(3), torch.randn(2, 3)]).double()
    weights = torch.randn(5).double() if is_weighted else None

    found = jet(network, x, directions, order=order, collapse=False if weights is None else weights)
    expected = jet_by_transforms(network, x, directions, order, weights)

    for derivative, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(derivative, reference.view_as(derivative), rtol=1e-9, atol=1e-7)


def test_polynomials_solve_a_smooth_problem_to_rounding():
    """One Gauss-Newton step on a grid solves Poisson's equation to 1e-12."""
    model = HardConstraint(new_polynomials([0, 0], [1, 1], [], [14, 14], 1), BoxDistance([0, 0], [1, 1]))

    def equation(model, x):
        _, _, laplacian = jet(model, x, collapse=True)
        return laplacian + 2 * math.pi**2 * torch.sin(math.pi * x).prod(1, keepdim=True)

    ends = torch.zeros(2).double(), torch.ones(2).double()
    points = grid_points(*ends, [], [21, 21])
    optimizer = LevenbergMarquardt(model, 1e-12, floor=1e-12)
    optimizer.fit([(equation, points)], 3, progress=False)

    x = torch.rand(100, 2).double()
    exact = torch.sin(math.pi * x).prod(1, keepdim=True)
    assert (model(x) - exact).abs().max() < 1e-12
