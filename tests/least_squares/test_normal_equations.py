# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from helpers import adapt
from residuals import network, problem, terms
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lotra.least_squares.normal_equations import LinearModel


def scaled_residuals(model: nn.Module, data: list[tuple]) -> Tensor:
    """Return the residuals whose sum of squares is the loss."""
    columns = []
    for function, rows, weight in data:
        scale = math.sqrt(weight / len(rows[0]))
        columns.append(scale * function(model, *rows).flatten())
    return torch.cat(columns)


def jacobian_by_autograd(model: nn.Module, residuals: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for residual in residuals:
        gradients = torch.autograd.grad(residual, parameters, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def damped_step(jacobian: Tensor, residuals: Tensor, damping: float, floor: float) -> Tensor:
    """Solve the damped system as a least-squares problem."""
    squares = jacobian.square().sum(0)
    scaling = squares.clamp(min=floor * squares.max().item())
    matrix = torch.cat([jacobian, torch.diag((damping * scaling).sqrt())])
    right = torch.cat([-residuals, torch.zeros_like(scaling)])
    return torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]


@pytest.mark.parametrize("points", [60, 160])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_jacobian_is_the_one_by_autograd_and_the_step_solves_the_damped_system(adapted, points):
    model, data = network(3), terms(points=points)
    model = adapt(model) if adapted else model
    expected_residuals = scaled_residuals(model, data)
    expected = jacobian_by_autograd(model, expected_residuals)
    residuals = expected_residuals.detach()
    step = damped_step(expected, residuals, damping=0.1, floor=1e-3)
    decrease = residuals.square().sum() - (residuals + expected @ step).square().sum()

    least_squares = problem(model, data)
    jacobian = torch.cat([least_squares.jacobian(*chunk) for chunk in least_squares.chunks()])
    linear = LinearModel(least_squares, residuals, floor=1e-3)

    assert_close(jacobian, expected, rtol=1e-10, atol=1e-10)
    assert linear.in_residual_space is (len(residuals) < expected.shape[1])
    assert_close(linear.solve(0.1), step, rtol=1e-6, atol=1e-9)
    assert linear.predicted_decrease(0.1, step) == pytest.approx(decrease.item())
    assert_close(least_squares.pull_back(residuals), expected.T @ residuals)


def test_a_jacobian_that_does_not_fit_needs_the_space_of_parameters():
    """The Jacobian is not stored there, and the steps are the same."""
    model, data = network(), terms(points=240)
    least_squares = problem(model, data, memory=2**21)
    residuals = least_squares.residuals(least_squares.start)
    assert len(residuals) < least_squares.num_parameters
    expected = LinearModel(problem(model, data), residuals, 1e-3)

    linear = LinearModel(least_squares, residuals, 1e-3)

    assert expected.in_residual_space
    assert not linear.in_residual_space
    assert_close(linear.solve(0.1), expected.solve(0.1), rtol=1e-6, atol=1e-9)


def test_a_jacobian_is_not_kept_where_the_matrix_is_enough():
    model, data = network(), terms(points=1000)
    least_squares = problem(model, data, memory=2**22)
    residuals = least_squares.residuals(least_squares.start)
    expected = LinearModel(problem(model, data), residuals, 1e-6)

    linear = LinearModel(least_squares, residuals, 1e-6)

    assert linear.jacobian is None
    assert expected.jacobian is not None
    assert_close(linear.solve(0.1), expected.solve(0.1), rtol=1e-6, atol=1e-9)
    assert_close(linear.after(residuals, residuals), expected.after(residuals, residuals))
