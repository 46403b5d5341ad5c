# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import math

import pytest
import torch
from helpers import adapt, assert_equal, assert_same, refused, snapshot, state
from residuals import fit, network, problem, terms
from torch import nn
from torch.testing import assert_close

from peft_lotra.least_squares import LevenbergMarquardt


# Models


@pytest.mark.parametrize("adapted", [False, True])
def test_a_pde_is_trained_without_a_loss_that_rises(adapted):
    model, data = network(8), terms(points=300)
    if adapted:
        model = adapt(model, random=False, r=(8, 8, 6))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    records = LevenbergMarquardt(model).fit(data, 15, progress=False)

    losses = [record.loss for record in records]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]
    for name, parameter in frozen.items():
        assert_equal(model.get_parameter(name), parameter)


def test_float32_models_are_stepped_in_double():
    """The step is the one of the double model, and the loss is evaluated at the parameters as stored."""
    model, data = network(dtype=torch.float32), terms(torch.float32)
    double = copy.deepcopy(model).double()
    double_data = [(function, tuple(row.double() for row in rows), weight) for function, rows, weight in data]

    record = LevenbergMarquardt(model).step(data)
    LevenbergMarquardt(double).step(double_data)

    assert_close(state(model), state(copy.deepcopy(double).float()), rtol=1e-5, atol=1e-6)
    stored = problem(model.double(), double_data)
    loss = stored.residuals(stored.start).square().sum().item()
    assert record.loss == pytest.approx(loss, rel=1e-12)


def test_a_record_has_the_loss_of_each_term():
    model, data = network(), terms(points=100)

    record = LevenbergMarquardt(model).fit(data, 3, progress=False)[-1]

    assert math.isnan(record.held_loss)
    assert sum(record.losses) == pytest.approx(record.loss)
    for (function, rows, weight), loss in zip(data, record.losses, strict=True):
        expected = weight * function(model, *rows).square().sum(-1).mean()
        assert loss == pytest.approx(expected.item())


def random_square(rows):
    return torch.rand(rows, 2, dtype=torch.float64) * 2 - 1


def waves(x):
    return torch.sin(7 * x).prod(1, keepdim=True)


def test_a_fit_of_few_rows_ends_with_the_best_held_loss():
    """With 24 rows and 300 parameters the loss falls to nothing, but the error between the rows stays."""
    x, between = random_square(24), random_square(300)
    model, held = network(8), [(fit, (between, waves(between)))]

    records = LevenbergMarquardt(model, 1e-6).fit([(fit, (x, waves(x)))], 60, held=held, patience=4, progress=False)

    losses = [record.held_loss for record in records]
    assert len(records) < 60
    assert losses[-1] > min(losses)
    assert (model(between) - waves(between)).square().mean().item() == pytest.approx(min(losses))


def test_steps_that_only_raise_the_held_loss_are_undone():
    x, y = linear_problem(20)
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    LevenbergMarquardt(model, 1e-9).step([(fit, (x, y))])
    best = model.weight.clone()

    records = LevenbergMarquardt(model).fit([(fit, (x, -y))], 9, held=[(fit, (x, y))], patience=3, progress=False)

    assert len(records) == 3
    assert_equal(model.weight, best)


def test_the_bar_shows_losses(capsys):
    LevenbergMarquardt(network()).fit(terms(points=50), 1, held=terms(points=10))

    bar = capsys.readouterr().err
    assert all(name in bar for name in ("loss=", "held=", "damping="))


def linear_problem(rows):
    x = torch.randn(rows, 5, dtype=torch.float64)
    noise = 0.1 * torch.randn(rows, 1, dtype=torch.float64)
    return x, x @ torch.arange(5.0, dtype=torch.float64)[:, None] + noise


def test_former_steps_are_forgotten_when_the_parameters_change():
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    optimizer = LevenbergMarquardt(model, forgetting=0.9)
    optimizer.step([(fit, linear_problem(20))])

    model.weight = nn.Parameter(torch.zeros(1, 5, dtype=torch.float64))
    model.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    assert optimizer.step([(fit, linear_problem(20))]).accepted


def test_forget_drops_former_steps():
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    optimizer = LevenbergMarquardt(model, forgetting=0.9)
    optimizer.step([(fit, linear_problem(20))])
    x, y = linear_problem(20)

    optimizer.forget()
    optimizer.damping = 1e-13
    optimizer.step([(fit, (x, y))])

    assert_close(model.weight.T, torch.linalg.lstsq(x, y).solution)


def weights_after(steps, batches, forgetting):
    """Return the weights of a linear model after steps with these batches in turn."""
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = LevenbergMarquardt(model, floor=1e-6, forgetting=forgetting)
    for number in range(steps):
        optimizer.step([(fit, batches[number % len(batches)])])
    return model.weight.detach()[0]


def test_auto_remembers_noisy_rows_that_are_drawn_again_for_each_step():
    exact = torch.arange(5.0, dtype=torch.float64)

    error, error_without = 0.0, 0.0
    for _ in range(4):
        batches = [linear_problem(10) for _ in range(40)]
        error += (weights_after(40, batches, "auto") - exact).norm().item()
        error_without += (weights_after(40, batches, 0.0) - exact).norm().item()

    assert error < 0.8 * error_without


@pytest.mark.parametrize("rows, count", [(10, 1), (2, 3)])
def test_auto_has_no_memory_of_fixed_rows_or_of_less_than_half_as_many_as_parameters(rows, count):
    batches = [linear_problem(rows) for _ in range(count)]

    weights = weights_after(3, batches, "auto")

    assert_equal(weights, weights_after(3, batches, 0.0))


def test_auto_drops_former_steps_of_another_function():
    first = LevenbergMarquardt(nn.Linear(5, 1, bias=False).double())
    first.step([(lambda model, x, y: 3 * fit(model, x, y), linear_problem(20))])
    second = LevenbergMarquardt(copy.deepcopy(first.model))
    second.damping = first.damping
    rows = linear_problem(20)

    assert first.step([(fit, rows)]) == second.step([(fit, rows)])


# What goes wrong


def nan_where_negative(model, x):
    return torch.where(x[:, :1] < 0, torch.nan, model(x))


def test_a_step_from_residuals_of_zero_says_that_the_loss_is_at_a_minimum():
    model = network()
    x = torch.rand(5, 2, dtype=torch.float64)
    optimizer = LevenbergMarquardt(model)

    with pytest.warns(RuntimeWarning, match="the gradient is zero: the loss is at a minimum"):
        record = optimizer.step([(lambda model, x: 0 * model(x), x)])

    assert (record.loss, record.accepted) == (0, False)


def test_residuals_that_are_not_finite_are_named_and_change_nothing():
    model, data = network(), terms()
    state = snapshot(model)
    x = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [-0.1, 0.3]], dtype=torch.float64)
    term = nan_where_negative, x
    optimizer = LevenbergMarquardt(model)
    message = r"residuals are NaN or infinite: 2 of 3 in residual term 2 \(nan_where_negative\), "
    message += r"first in row 1: \[-0.5, 0.0\]. The parameters are unchanged"

    with pytest.warns(RuntimeWarning, match=message):
        record = optimizer.step([*data, term])

    assert not record.accepted
    assert math.isnan(record.loss)
    assert "residual term 2" in record.reason
    assert_same(model, state)
    with pytest.warns(RuntimeWarning):
        assert len(optimizer.fit([*data, term], 5, progress=False)) == 1
    assert optimizer.step(data).accepted


def test_held_residuals_that_are_not_finite_are_named():
    """All steps are undone without a finite held loss."""
    held = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)

    with pytest.warns(RuntimeWarning, match=r"Held-out residuals .* 1 of 2 in residual term 0 \(nan_where_negative\)"):
        LevenbergMarquardt(network()).fit(terms(), 1, held=[(nan_where_negative, held)], progress=False)


class Twice(nn.Module):
    """Two parameters with the same effect."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return (self.a + self.b) * x


def test_singular_equations_are_solved_and_the_stop_at_the_minimum_is_explained():
    model, x = Twice(), torch.ones(2, 1, dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    *_, record = LevenbergMarquardt(model, 1e-16).fit([(fit, (x, y))], 50, progress=False)

    assert (model.a + model.b).item() == pytest.approx(0.5)
    assert not record.accepted
    assert "at a minimum to rounding, or the normal equations are singular" in record.reason


def test_too_little_memory_is_refused_with_the_least_that_is_needed():
    model, data = network(12), terms(points=20)
    count = sum(parameter.numel() for parameter in model.parameters())

    with refused(rf"{count} trainable parameters and 1540 residuals need .* MiB"):
        LevenbergMarquardt(model, memory=2**24).step(terms(points=1500))
    with refused("need 2 MiB"):
        LevenbergMarquardt(model, memory=2**20).step(data)
    assert LevenbergMarquardt(model, memory=2 * 2**20).step(data).accepted


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"damping": 0.0}, "`damping` is"),
        ({"damping": math.nan}, "`damping` is"),
        ({"floor": 2.0}, "`floor` is"),
        ({"forgetting": 1.0}, "`forgetting` is"),
        ({"group": object()}, "init_process_group"),
        ({"model": network().parameters()}, "`model` must be a network"),
        ({"model": network().requires_grad_(False)}, "No parameter of the model requires a gradient"),
        ({"model": nn.Linear(2, 1, dtype=torch.complex64)}, "`weight` is complex"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with refused(message, error=(TypeError, ValueError)):
        LevenbergMarquardt(**{"model": network(), **arguments})


def test_a_fit_ends_after_its_steps_by_the_callback_or_by_patience():
    optimizer, data, numbers = LevenbergMarquardt(network()), terms(), []

    records = optimizer.fit(data, 3, callback=lambda number, record: numbers.append(number), progress=False)

    assert numbers == [0, 1, 2]
    assert len(records) == 3
    assert optimizer.damping == records[-1].damping
    assert len(optimizer.fit(data, 9, callback=lambda number, record: number == 1, progress=False)) == 2
    assert len(optimizer.fit(data, 9, tolerance=1.0, patience=2, progress=False)) == 2
