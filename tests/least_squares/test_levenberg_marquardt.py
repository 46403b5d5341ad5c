# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import adapt, assert_same, snapshot
from residuals import fit, network, problem, terms
from torch import Tensor, nn

from peft_lotra.least_squares import LevenbergMarquardt


# Models


@pytest.mark.parametrize("adapted", [False, True])
def test_trains_a_pde(adapted):
    model, data = network(8), terms(points=300)
    model = adapt(model, random=False, r=(8, 8, 6)) if adapted else model
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    history = LevenbergMarquardt(model).fit(data, 15, progress=False)
    losses = [record.loss for record in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_float32_models_are_stepped_in_double():
    """The step is that of the double model, and the loss that of the parameters as stored."""
    model, data = network(dtype=torch.float32), terms(torch.float32)
    double = copy.deepcopy(model).double()
    record = LevenbergMarquardt(model).step(data)
    doubled = [(f, tuple(row.double() for row in rows), weight) for f, rows, weight in data]
    LevenbergMarquardt(double).step(doubled)
    for a, e in zip(model.parameters(), double.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=1e-6)
    stored = problem(model.double(), doubled)
    assert record.loss == pytest.approx(stored.residuals(stored.start).square().sum().item(), rel=1e-12)


def test_losses_of_terms():
    model, data = network(), terms(points=100)
    record = LevenbergMarquardt(model).fit(data, 3, progress=False)[-1]
    assert math.isnan(record.held_loss) and sum(record.losses) == pytest.approx(record.loss)
    for (function, rows, weight), loss in zip(data, record.losses, strict=True):
        expected = weight * function(model, *rows).square().sum(-1).mean()
        assert loss == pytest.approx(expected.item())


def test_a_fit_of_its_own_rows_alone_ends_with_the_best_held_loss():
    """24 rows and 300 parameters: the loss falls to nothing, the error between the rows does not."""
    x, between = (torch.rand(n, 2, dtype=torch.float64) * 2 - 1 for n in (24, 300))
    y, wanted = (torch.sin(7 * part).prod(1, keepdim=True) for part in (x, between))
    model, held = network(8), [(fit, (between, wanted))]
    records = LevenbergMarquardt(model, 1e-6).fit([(fit, (x, y))], 60, held=held, patience=4, progress=False)
    losses = [entry.held_loss for entry in records]
    assert len(records) < 60 and losses[-1] > min(losses)
    assert (model(between) - wanted).square().mean().item() == pytest.approx(min(losses))


def test_steps_that_only_raise_the_held_loss_are_undone():
    x, y = linear_problem(20)
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    LevenbergMarquardt(model, 1e-9).step([(fit, (x, y))])
    best, other = model.weight.clone(), [(fit, (x, -y))]
    records = LevenbergMarquardt(model).fit(other, 9, held=[(fit, (x, y))], patience=3, progress=False)
    assert len(records) == 3 and torch.equal(model.weight, best)


def test_the_bar_shows_losses(capsys):
    LevenbergMarquardt(network()).fit(terms(points=50), 1, held=terms(points=10))
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("loss=", "held=", "damping="))


def linear_problem(rows: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 5, dtype=torch.float64)
    return x, x @ torch.arange(5.0, dtype=torch.float64)[:, None] + 0.1 * torch.randn(rows, 1, dtype=torch.float64)


def test_forgetting_is_recursive_least_squares():
    """On a linear model, the parameters are those of weighted least squares on all rows so far."""
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    optimizer = LevenbergMarquardt(model, 1e-13, floor=1e-6, forgetting=0.5)
    batches = [linear_problem(4 if number == 1 else 20) for number in range(4)]
    for batch in batches:
        assert optimizer.step([(fit, batch)]).accepted and optimizer.damping >= 1e-7
        optimizer.damping = 1e-13
    weights = [torch.full((len(x), 1), 0.5 ** (3 - n) / len(x)).double().sqrt() for n, (x, _) in enumerate(batches)]
    x, y = (torch.cat([w * batch[i] for w, batch in zip(weights, batches, strict=True)]) for i in (0, 1))
    torch.testing.assert_close(model.weight.T, torch.linalg.lstsq(x, y).solution)


def test_former_steps_are_forgotten_when_the_parameters_change():
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    optimizer = LevenbergMarquardt(model, forgetting=0.9)
    optimizer.step([(fit, linear_problem(20))])
    model.weight = nn.Parameter(torch.zeros(1, 5, dtype=torch.float64))
    model.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    assert optimizer.step([(fit, linear_problem(20))]).accepted
    new = linear_problem(20)
    optimizer.damping = 1e-13
    optimizer.forget()
    optimizer.step([(fit, new)])
    ones = torch.cat([new[0], torch.ones_like(new[1])], 1)
    best = torch.linalg.lstsq(ones, new[1]).solution
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1).T, best)


def after(batches: list, forgetting: float | str, steps: int) -> Tensor:
    """The weights of a linear model after steps of these batches in turn."""
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = LevenbergMarquardt(model, floor=1e-6, forgetting=forgetting)
    for number in range(steps):
        optimizer.step([(fit, batches[number % len(batches)])])
    return model.weight.detach()[0]


def test_auto_remembers_noisy_rows_that_are_drawn_anew():
    true, errors = torch.arange(5.0, dtype=torch.float64), {"auto": 0.0, 0.0: 0.0}
    for _ in range(4):
        batches = [linear_problem(10) for _ in range(60)]
        for factor in errors:
            errors[factor] += (after(batches, factor, 60) - true).norm().item()

    assert errors["auto"] < 0.8 * errors[0.0]


@pytest.mark.parametrize("rows", [10, 2])
def test_auto_without_rows_drawn_anew(rows):
    """It is no forgetting for fixed rows, and for less than half as many as parameters."""
    batches = [linear_problem(rows) for _ in range(1 if rows == 10 else 3)]
    torch.testing.assert_close(after(batches, "auto", 3), after(batches, 0.0, 3), rtol=0, atol=0)


def test_auto_drops_former_steps_of_another_function():
    optimizers = [LevenbergMarquardt(nn.Linear(5, 1, bias=False).double()) for _ in range(2)]
    optimizers[0].step([(lambda model, x, y: 3 * fit(model, x, y), linear_problem(20))])
    optimizers[1].model.load_state_dict(optimizers[0].model.state_dict())
    optimizers[1].damping, rows = optimizers[0].damping, linear_problem(20)
    first, second = (optimizer.step([(fit, rows)]) for optimizer in optimizers)
    assert first == second


# What goes wrong


def nan_where_negative(model: nn.Module, x: Tensor) -> Tensor:
    return torch.where(x[:, :1] < 0, torch.nan, model(x))


def test_residuals_that_are_not_finite():
    model, data = network(), terms()
    before = snapshot(model)
    x = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [-0.1, 0.3]], dtype=torch.float64)
    optimizer = LevenbergMarquardt(model)
    expected = r"residuals are NaN or infinite: 2 of 3 in residual term 2 \(nan_where_negative\), "
    expected += r"first in row 1: \[-0.5, 0.0\]. The parameters are unchanged"
    with pytest.warns(RuntimeWarning, match=expected):
        record = optimizer.step([*data, (nan_where_negative, x)])
    assert not record.accepted and math.isnan(record.loss) and "residual term 2" in record.reason
    assert_same(model, before)
    with pytest.warns(RuntimeWarning):
        assert len(optimizer.fit([*data, (nan_where_negative, x)], 5, progress=False)) == 1
    assert optimizer.step(data).accepted


def test_held_residuals_that_are_not_finite_are_named():
    """Without a held loss that is finite, all steps are undone."""
    held = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)

    with pytest.warns(RuntimeWarning, match=r"Held-out residuals .* 1 of 2 in residual term 0 \(nan_where_negative\)"):
        LevenbergMarquardt(network()).fit(terms(), 1, held=[(nan_where_negative, held)], progress=False)


def test_singular_equations_and_a_clear_stop():
    """Two parameters that do the same, then a minimum that nothing improves."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a + self.b) * x

    model, x = Twice(), torch.ones(2, 1, dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    history = LevenbergMarquardt(model, 1e-16).fit([(fit, (x, y))], 50, progress=False)
    assert (model.a + model.b).item() == pytest.approx(0.5)
    before = snapshot(model)
    last = history[-1]
    assert not last.accepted and "at a minimum to rounding, or the normal equations are singular" in last.reason
    assert_same(model, before)


def test_too_many_parameters_for_the_memory():
    model, data = network(12), terms(points=1500)
    count = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=rf"{count} trainable parameters and 1540 residuals need .* MiB"):
        LevenbergMarquardt(model, memory=2**24).step(data)


def test_the_least_memory_is_asked_for():
    model, data = network(12), terms(points=20)
    with pytest.raises(ValueError, match="need 2 MiB"):
        LevenbergMarquardt(model, memory=2**20).step(data)
    assert LevenbergMarquardt(model, memory=2 * 2**20).step(data).accepted


def test_arguments():
    model = network()
    for wrong in ({"damping": 0.0}, {"damping": math.nan}, {"floor": 2.0}, {"forgetting": 1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
            LevenbergMarquardt(model, **wrong)
    with pytest.raises(TypeError, match="`model` must be a network"):
        LevenbergMarquardt(model.parameters())
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        LevenbergMarquardt(model.requires_grad_(False))


# fit


def test_stopping_rules():
    model, data = network(), terms()
    seen = []
    optimizer = LevenbergMarquardt(model)
    history = optimizer.fit(data, 3, callback=lambda number, record: seen.append(number), progress=False)
    assert len(history) == 3 and seen == [0, 1, 2] and optimizer.damping == history[-1].damping
    assert len(optimizer.fit(data, 9, callback=lambda number, record: number == 1, progress=False)) == 2
    assert len(optimizer.fit(data, 9, tolerance=1.0, patience=2, progress=False)) == 2
