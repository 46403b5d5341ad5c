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


def test_jacobian_that_does_not_fit_is_recomputed(monkeypatch):
    model, data = network(8), terms(points=60)
    least_squares = problem(model, data)
    residuals = least_squares.residuals(least_squares.start)
    at_once = LinearModel(least_squares, residuals, 1e-6)
    monkeypatch.setattr("peft_lotra.least_squares.problem.CHUNK", 2**23)
    small = problem(model, data, memory=2**20)
    parts = LinearModel(small, residuals, 1e-6)
    assert at_once.jacobian is not None and parts.jacobian is None
    torch.testing.assert_close(parts.matrix, at_once.matrix)
    torch.testing.assert_close(parts.solve(0.1), at_once.solve(0.1), rtol=1e-6, atol=1e-9)
