# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from helpers import adapt
from residuals import network, problem, terms

from peft_lotra.least_squares.normal_equations import LinearModel


@pytest.mark.parametrize("points", [60, 400])
@pytest.mark.parametrize("adapted", [False, True])
def test_jacobian_and_step(adapted, points):
    """Against the Jacobian of autograd, and the damped system solved as a least-squares problem."""
    model, data = network(), terms(points=points)
    model = adapt(model) if adapted else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = [math.sqrt(weight / len(rows[0])) for _, rows, weight in data]
    residuals = torch.cat([s * f(model, *rows).flatten() for s, (f, rows, _) in zip(weights, data, strict=True)])
    expected = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(r, parameters, retain_graph=True)]) for r in residuals]
    )

    least_squares = problem(model, data)
    found = torch.cat([least_squares.jacobian(*chunk) for chunk in least_squares.chunks()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    linear = LinearModel(least_squares, residuals.detach(), floor=1e-3)
    assert linear.in_residual_space is (len(residuals) < expected.shape[1])
    squares = expected.square().sum(0)
    scaling = squares.clamp(min=1e-3 * squares.max().item())
    stacked = torch.cat([expected, torch.diag((0.1 * scaling).sqrt())])
    right = torch.cat([-residuals, torch.zeros_like(scaling)]).detach()
    step = torch.linalg.lstsq(stacked, right[:, None]).solution[:, 0]
    torch.testing.assert_close(linear.solve(0.1), step, rtol=1e-6, atol=1e-9)
    promised = residuals.square().sum() - (residuals + expected @ step).square().sum()
    assert linear.predicted_decrease(0.1, step) == pytest.approx(promised.item())
    torch.testing.assert_close(least_squares.pull_back(residuals.detach()), expected.T @ residuals.detach())


def test_a_jacobian_that_does_not_fit_needs_the_space_of_parameters():
    """There it is not kept; the steps are the same."""
    model, data = network(), terms(points=240)
    least_squares = problem(model, data, memory=2**21)
    residuals = least_squares.residuals(least_squares.start)
    assert len(residuals) < least_squares.num_parameters
    expected = LinearModel(problem(model, data), residuals, 1e-3)

    linear = LinearModel(least_squares, residuals, 1e-3)

    assert expected.in_residual_space and not linear.in_residual_space
    torch.testing.assert_close(linear.solve(0.1), expected.solve(0.1), rtol=1e-6, atol=1e-9)


def test_a_jacobian_is_not_kept_where_the_matrix_is_enough():
    model, data = network(), terms(points=1000)
    least_squares = problem(model, data, memory=2**22)
    residuals = least_squares.residuals(least_squares.start)
    kept = LinearModel(problem(model, data), residuals, 1e-6)

    linear = LinearModel(least_squares, residuals, 1e-6)

    assert linear.jacobian is None and kept.jacobian is not None
    torch.testing.assert_close(linear.solve(0.1), kept.solve(0.1), rtol=1e-6, atol=1e-9)
    for values, expected in zip(linear.after(residuals, residuals), kept.after(residuals, residuals), strict=True):
        torch.testing.assert_close(values, expected)
