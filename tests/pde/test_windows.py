# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from helpers import refuses
from torch import Tensor, nn

from peft_lotra.derivatives.torch_fallback import jet_by_transforms
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, HardConstraint, race, solve
from peft_lotra.pde.windows import Windows


ENDS = [0.0, 0.3, 0.6, 1.0]


def tanh_network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))


def spline_network() -> nn.Module:
    return KAN([2, 3, 2], 4, 5)


def new_windows(smoothness: int, network=tanh_network) -> Windows:
    torch.manual_seed(0)
    return Windows([network() for _ in range(3)], ENDS, time=1, smoothness=smoothness).double()


def at_ends(step: float) -> Tensor:
    return torch.tensor([[0.2, 0.3 + step], [0.7, 0.6 + step]], dtype=torch.float64)


@pytest.mark.parametrize("smoothness", [1, 2])
def test_the_value_and_the_prescribed_derivatives_are_continuous(smoothness):
    windows = new_windows(smoothness)

    values, (slope, velocity), _ = jet(windows, at_ends(-1e-9))
    values_after, (slope_after, velocity_after), _ = jet(windows, at_ends(1e-9))

    torch.testing.assert_close(values, values_after, rtol=0, atol=1e-6)
    torch.testing.assert_close(slope, slope_after, rtol=0, atol=1e-6)
    jump = (velocity - velocity_after).abs().max()
    assert (jump < 1e-6) == (smoothness == 2)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("network", [tanh_network, spline_network])
@pytest.mark.parametrize("smoothness", [1, 2])
def test_the_jet_is_the_one_by_transforms(smoothness, network, order):
    windows = new_windows(smoothness, network)
    x, directions = torch.rand(7, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    weights = None if order == 1 else torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    derivatives = jet(windows, x, directions, order=order, collapse=False if weights is None else weights)

    expected = jet_by_transforms(windows.__call__, x, directions, order, weights)
    torch.testing.assert_close(list(derivatives), list(expected), rtol=1e-9, atol=1e-8)


def test_the_active_window_is_the_one_that_rows_with_its_times_take():
    windows = new_windows(2)
    x = torch.tensor([[0.4, 0.7], [0.1, 0.9]], dtype=torch.float64)
    expected = jet(windows, x)

    windows.activate(2)

    torch.testing.assert_close(jet(windows, x), expected)
    for name, parameter in windows.named_parameters():
        assert parameter.requires_grad == name.startswith("networks.2.")


def test_windows_keep_exact_conditions():
    distance = BoxDistance((0, 0), (1, 1), [(0, "low"), (0, "high"), (1, "low")])
    model = HardConstraint(new_windows(1), distance, lambda x: x[..., :1]).double()
    walls = torch.tensor([[0.0, 0.2], [1.0, 0.5], [0.0, 0.8], [1.0, 1.0]], dtype=torch.float64)

    torch.testing.assert_close(model(walls), walls[:, :1].expand(4, 2))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few points and narrow networks."""
    monkeypatch.setattr(race, "POINTS", 200)
    monkeypatch.setattr("peft_lotra.pde.networks.SMALL_WIDTHS", (4, 6))


def oscillation(model: nn.Module, x: Tensor) -> Tensor:
    """Return the residual of u'' = -u."""
    u, _, (second,) = jet(model, x)
    return second + u


def test_solve_continues_an_oscillation_from_window_to_window():
    options = {"distance": lambda x: x**2, "lift": torch.ones_like}

    result = solve(oscillation, [0], [4 * math.pi], windows=4, steps=60, progress=False, **options)

    x = torch.linspace(0, 4 * math.pi, 50, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(result.model(x), torch.cos(x), rtol=0, atol=1e-2)
    assert [phase.network for phase in result.phases][-1] == "splines in window 3"
    assert isinstance(result.model.kan, Windows) and result.model.kan.smoothness == 2


def test_a_residual_by_autograd_is_solved_in_windows():
    def by_autograd(model: nn.Module, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x, create_graph=True)[0] + model(x)

    options = {"distance": lambda x: x**2, "lift": torch.ones_like, "windows": 2, "steps": 6, "progress": False}

    result = solve(by_autograd, [0], [3], **options)
    expected = solve(oscillation, [0], [3], **options)

    assert result.history[-1].loss == pytest.approx(expected.history[-1].loss, rel=0.05)


def test_rows_may_have_more_dimensions():
    windows, x = new_windows(2), torch.rand(2, 3, 2, dtype=torch.float64)

    torch.testing.assert_close(windows(x).flatten(0, 1), windows(x.flatten(0, 1)))


def test_terms_count_in_the_window_of_their_points():
    points = torch.tensor([[0.5], [2.5]], dtype=torch.float64)
    data = (lambda model, x, y: model(x) - y, (points, 2 * points))
    options = {"distance": lambda x: x, "terms": [data], "windows": 2, "steps": 30, "progress": False}

    # a line, whose slope is data
    result = solve(lambda model, x: jet(model, x)[2][0], [0], [3], **options)

    torch.testing.assert_close(result.model(points), 2 * points, rtol=0, atol=1e-2)


def solved(**options):
    return solve(oscillation, [0], [1], **{"distance": lambda x: x, "windows": 2, "progress": False, **options})


WRONG = {
    "needs a time coordinate": lambda: solved(distance=BoxDistance([0], [1])),
    "`windows` is 0": lambda: solved(windows=0),
    "`steps` is 2": lambda: solved(windows=4, steps=2),
    "`network` is given": lambda: solved(network=nn.Linear(1, 1)),
    "it must be points": lambda: solved(terms=[(lambda model, y: y, torch.ones(3))]),
}


test_windows_that_cannot_be_used_are_refused = refuses(WRONG)


def test_a_callback_sees_all_windows():
    def equation(model: nn.Module, x: Tensor) -> Tensor:
        u, (du,), _ = jet(model, x)
        return du + u

    x = torch.tensor([[0.1]], dtype=torch.float64)
    values = []

    def callback(solution, record):
        values.append(solution.model(x).detach())

    options = {"distance": lambda x: x, "lift": 1.0, "windows": 3, "steps": 30, "progress": False}
    result = solve(equation, [0], [1], callback=callback, **options)

    torch.testing.assert_close(values[-1], result.model(x), rtol=1e-6, atol=1e-8)
