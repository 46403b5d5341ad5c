# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from residuals import network, problem, terms
from torch.testing import assert_close

from peft_lotra.least_squares.normal_equations import LinearModel


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
