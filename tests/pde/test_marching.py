# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Polynomials on the whole box, windows in time whose errors are controlled, and the errors of solutions."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pde_problems import error, poisson
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, load_network, marching, solve
from peft_lotra.pde.windows import Windows


SQUARE = (0.0, 0.0), (1.0, 1.0)


def since_start(x: Tensor) -> Tensor:
    return x[..., -1:]


def logistic(model: nn.Module, x: Tensor) -> Tensor:
    """Return the residual of u' = 5 u (1 - u), whose solution leaves zero late."""
    u, (rate,) = jet(model, x, order=1)
    return rate - 5 * u * (1 - u)


def grown(x: Tensor) -> Tensor:
    growth = 1e-3 * torch.exp(5 * x)
    return growth / (1 - 1e-3 + growth)


def solve_logistic(**options):
    defaults = {"distance": since_start, "lift": 1e-3, "steps": 400, "progress": False}
    return solve(logistic, [0], [4], **(defaults | options))


@pytest.fixture(scope="module")
def marched():
    """The logistic growth, which polynomials on the whole box do not solve."""
    return solve_logistic()


def heat(model: nn.Module, x: Tensor) -> Tensor:
    _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t - 0.1 * u_xx


def sine(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., :1])


def names(result) -> list[str]:
    return [phase.name for phase in result.phases]


def test_a_smooth_problem_is_solved_on_the_whole_box():
    """The heat equation needs no march, and its error is estimated within a factor of ten."""
    box = BoxDistance(*SQUARE, sides=[(0, "low"), (0, "high"), (1, "low")])

    result = solve(heat, *SQUARE, distance=box, lift=sine, steps=200, progress=False)

    exact = error(result, lambda x: sine(x) * torch.exp(-0.1 * math.pi**2 * x[:, 1:]))
    assert names(result) == ["polynomials"]
    assert exact < 1e-7
    assert exact / 10 < result.error + 1e-13


def test_time_is_marched_where_the_whole_box_fails(marched):
    """The windows are as long as their error allows, and two marches tell the error."""
    ends = marched.model.kan.ends
    widths = ends.diff()

    exact = error(marched, grown)
    assert isinstance(marched.model.kan, Windows)
    assert exact < 1e-6
    assert exact / 10 < marched.error < 1e-5
    assert widths.max() > 1.2 * widths.min()
    assert "estimated" in str(marched)


def test_a_march_is_the_same_each_time(marched):
    again = solve_logistic()

    assert again.error == pytest.approx(marched.error, rel=1e-3)


def test_marched_windows_are_saved_and_loaded(marched, tmp_path):
    marched.save(tmp_path / "u.safetensors")

    network = load_network(tmp_path / "u.safetensors")

    x = torch.rand(50, 1).double()
    assert torch.equal(network(x), marched.model.kan(x))


def test_a_march_that_the_budget_does_not_hold_is_given_up():
    """With few steps, the answer is not exact, and its error is large or unknown."""
    result = solve_logistic(steps=40)

    exact = error(result, grown)
    assert exact < 1e-3 or not result.error < exact / 10
    assert exact < 0.05 or any("may be wrong" in note or "estimated error" in note for note in result.notes)


def test_a_callback_sees_the_best_solution_and_ends_the_search():
    seen = []

    def callback(solution, record):
        seen.append(solution.model)
        return len(seen) == 20

    result = solve_logistic(callback=callback)

    assert len(seen) == len(result.history) == 20
    assert result.model is seen[-1]
    assert result.phases[-1].reason == "callback"


def test_a_delay_is_evaluated_in_the_windows_before():
    """u'(t) = -u(t - 1), u = 1 before 0: a polynomial in each unit of time."""

    def equation(model, x):
        _, (rate,) = jet(model, x, order=1)
        before = model((x - 1).clamp(min=0.0))
        return rate + torch.where(x > 1, before, torch.ones_like(x))

    result = solve(equation, [0], [3], distance=since_start, lift=1.0, steps=300, progress=False)

    x = torch.tensor([[1.0], [2.0], [3.0]]).double()
    exact = torch.tensor([[0.0], [-0.5], [-1 / 6]]).double()
    torch.testing.assert_close(result.model(x), exact, rtol=0, atol=1e-3)
    assert result.error < 1e-2


def test_an_integral_over_all_times_is_not_marched(monkeypatch):
    """The first window would be solved with what the windows after it are not yet."""
    monkeypatch.setattr(marching, "WHOLE", 0.0)

    def equation(model, x):
        _, (rate,) = jet(model, x, order=1)
        nodes = torch.linspace(0, 1, 11).double()
        places = nodes.expand(len(x), -1).reshape(-1, 1)
        mean = model(places).view(len(x), -1).mean(1, keepdim=True)
        return rate - mean

    result = solve(equation, [0], [1], distance=since_start, lift=1.0, steps=40, progress=False)

    reasons = [phase.reason for phase in result.phases if phase.name.startswith("march")]
    assert set(reasons) <= {"looks ahead"}
    assert not isinstance(result.model.kan, Windows)


def test_terms_count_in_the_window_of_their_points(monkeypatch):
    """A line whose values are data at many times, and a condition that holds at the end alone is not marched."""
    monkeypatch.setattr(marching, "WHOLE", 0.0)
    points = torch.linspace(0.1, 3, 20).double().unsqueeze(1)
    seen = []

    def data(model, x, y):
        seen.append(len(x))
        return model(x) - y

    def equation(model, x):
        return jet(model, x, order=1)[1][0] - 2

    terms = [(data, (points, 2 * points), 1.0)]
    result = solve(equation, [0], [3], distance=since_start, terms=terms, steps=60, progress=False)

    assert isinstance(result.model.kan, Windows)
    assert 2 in seen
    torch.testing.assert_close(result.model(points), 2 * points, rtol=0, atol=1e-8)

    terms = [(data, (points[-1:], 2 * points[-1:]), 1.0)]
    result = solve(equation, [0], [3], distance=since_start, terms=terms, steps=60, progress=False)
    assert not any(name.startswith("march") for name in names(result))


def test_a_problem_without_time_is_not_marched():
    result = solve(poisson, *SQUARE, distance=BoxDistance(*SQUARE), steps=60, progress=False)

    assert not any(name.startswith("march") for name in names(result))
    assert not math.isnan(result.error)


@pytest.mark.filterwarnings("error:Step refused")
def test_an_equation_without_a_solution_is_reported(monkeypatch):
    """No small error is claimed, and the report says that the solution may be wrong."""
    monkeypatch.setattr("peft_lotra.pde.race.POINTS", 200)
    monkeypatch.setattr("peft_lotra.pde.networks.WIDTHS", (4, 5))

    def negative_square(model, x):
        return model(x) ** 2 + 1

    result = solve(negative_square, [0], [1], distance=BoxDistance([0], [1]), steps=60, progress=False)

    assert not result.error < 0.05
    assert any("may be wrong" in note or "estimated error" in note for note in result.notes)


def test_terms_that_contradict_each_other_are_reported():
    """u = 0 and u = 1 at the same place."""
    end = torch.ones(20, 1).double()
    terms = [(lambda model, x, value=value: model(x) - value, end, 100.0) for value in (0.0, 1.0)]

    result = solve(poisson, [0], [1], distance=since_start, terms=terms, steps=60, progress=False)

    assert any("Term" in note and "likely wrong" in note for note in result.notes)


def test_the_error_of_a_network_of_the_caller_is_estimated():
    """The correction by polynomials is the error of a linear problem."""
    torch.manual_seed(0)
    network = KAN([1, 5, 1], 6, 4, norm="tanh")

    result = solve(poisson, [0], [10], distance=BoxDistance([0], [10]), network=network, steps=40, progress=False)

    exact = error(result, lambda x: x * (10 - x) / 2)
    assert 0.3 < result.error / exact < 10


def test_inputs_outside_of_the_box_warn_once(marched):
    """The equation was not solved there."""
    x = torch.tensor([[4.5]]).double()

    with pytest.warns(UserWarning, match="outside of the box: coordinate 0 is 4.5 in row"):
        marched.model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marched.model(x)
        marched.model(x - 1)
