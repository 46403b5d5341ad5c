# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Warnings of solutions that are wrong although their residuals are small; all else is silent."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from pde_problems import poisson
from peft import get_peft_model
from residuals import fit
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.derivatives import api
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, disk, polygon, robin, side_points, solve
from peft_lotra.pde.features import BoxFeatures


UNIT = (0.0, 0.0), (1.0, 1.0)
silent = pytest.mark.filterwarnings("error")  # warnings fail the test


def run(residual=poisson, low=(0.0, 0.0), high=(1.0, 1.0), **options):
    """Take one step with a small network."""
    torch.manual_seed(0)
    count = len(low) + len(options.get("periodic", ()))
    defaults = {
        "distance": BoxDistance(low, high),
        "network": nn.Sequential(nn.Linear(count, 6), nn.Tanh(), nn.Linear(6, 1)),
        "steps": 1,
        "progress": False,
    }
    return solve(residual, low, high, **(defaults | options))


ROUGH = {
    "relu": lambda x: torch.relu(x[..., :1] - 0.3337),
    "abs along the other coordinate": lambda x: (x[..., 1:] - 0.71).abs(),
    "weak compared with a wave": lambda x: 10 * torch.sin(9 * x[..., :1]) + 0.3 * (x[..., :1] - 0.6).abs(),
    "a step": lambda x: (x[..., :1] > 0.4).to(x),
    "the larger coordinate": lambda x: x.amax(-1, keepdim=True),
    "a lid at its side alone": lambda x: (x[..., 1:] == 1).to(x),
    "a lid that jumps at the corner": lambda x: (
        x[..., 1:] * x[..., :1] * (1 - x[..., :1]) / (x[..., :1] * (1 - x[..., :1]) + 1 - x[..., 1:])
    ),
    "the distance from a circle": lambda x: ((x - 0.5).norm(dim=-1, keepdim=True) - 0.2).abs(),
}


@pytest.mark.parametrize("name", ROUGH)
def test_a_lift_with_a_kink_or_a_jump_warns(name):
    with pytest.warns(UserWarning, match=r"`lift` has a kink or a jump near \("):
        result = run(lift=ROUGH[name])

    assert "kink" in result.notes[0]


def test_a_distance_with_a_kink_warns():
    box = BoxDistance(*UNIT)

    with pytest.warns(UserWarning, match="`distance` has a kink or a jump"):
        run(distance=lambda x: ROUGH["the distance from a circle"](x) * box(x))


def test_the_rounding_of_float32_is_not_called_a_kink():
    with pytest.warns(UserWarning, match=r"`lift` returns torch.float32") as records:
        run(lift=lambda x: torch.sin(math.pi * x[..., :1].float()))

    assert not any("kink" in str(record.message) for record in records)


SMOOTH = {
    "many waves": lambda x: torch.sin(50 * math.pi * x[..., :1]),
    "a thin layer": lambda x: torch.tanh((x[..., :1] - 0.3) / 3e-3),
    "rounded to float32": lambda x: torch.sin(3 * x[..., :1].float()).to(x),
    "small changes of a large number": lambda x: 1e6 + torch.sin(3 * x[..., 1:]),
    "a regularized lid": lambda x: x[..., 1:] * (1 - (2 * x[..., :1] - 1) ** 16),
    "an R-function with a corner": lambda x: x.sum(-1, keepdim=True) - 1 + (x - 0.5).norm(dim=-1, keepdim=True),
    "a constant": lambda x: 0 * x[..., :1] + 3,
}


@pytest.mark.parametrize("name", SMOOTH)
@silent
def test_a_smooth_lift_does_not_warn(name):
    run(lift=SMOOTH[name])


APERIODIC = {
    "values": lambda x: x[..., :1],
    "slopes": lambda x: (x[..., :1] - 0.5) ** 2,
}


@pytest.mark.parametrize("name", APERIODIC)
@pytest.mark.parametrize("argument", ["lift", "distance"])
@pytest.mark.parametrize("features", [False, True])
def test_a_function_that_is_not_periodic_warns(name, argument, features):
    function = APERIODIC[name]
    options = {"distance": lambda x: x[..., 1:], "periodic": [0]}
    if argument == "lift":
        options["lift"] = function
    else:
        options["distance"] = lambda x: x[..., 1:] * function(x)
    if features:
        layers = BoxFeatures(*UNIT, periodic=[0]), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)
        options |= {"network": nn.Sequential(*layers), "periodic": []}

    with pytest.warns(UserWarning, match=f"`{argument}` is not periodic in coordinate 0"):
        run(**options)


@silent
def test_a_periodic_lift_does_not_warn():
    run(distance=lambda x: x[..., 1:], periodic=[0], lift=lambda x: torch.sin(2 * math.pi * x[..., :1]))


def by_autograd(rate: Tensor):
    def residual(model: nn.Module, x: Tensor) -> Tensor:
        x.requires_grad_(True)
        (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slopes[:, 0].sum(), x)
        return second[:, :1] + rate

    return residual


def data(rate: Tensor):
    return lambda model, x: model(x) - rate


UNTRAINED = {
    "`residual`, `lift` or `distance` depends": lambda rate: {"residual": lambda model, x: poisson(model, x) - rate},
    "`residual`, .* depends on a": lambda rate: {"residual": by_autograd(rate)},
    "Term 1 of `terms` depends": lambda rate: {
        "terms": [(data(torch.ones(1)), torch.rand(5, 2)), (data(rate), torch.rand(5, 2))]
    },
    "`lift` or `distance` depends": lambda rate: {"lift": lambda x: rate * x[..., :1] ** 2},
    "`distance` depends": lambda rate: {"distance": lambda x: rate * BoxDistance(*UNIT)(x)},
}


@pytest.mark.parametrize("message", UNTRAINED)
def test_a_parameter_that_is_not_trained_warns(message):
    rate = nn.Parameter(torch.tensor(2.0))

    with pytest.warns(UserWarning, match=rf"{message}.* shape \(\) .*`unknowns`") as records:
        run(**UNTRAINED[message](rate))

    assert sum("unknowns" in str(record.message) for record in records) == 1


class Extension(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.size * torch.sin(x[..., :1])


@silent
def test_what_is_trained_or_constant_does_not_warn():
    """Parameters of a lift are trained, and points that a residual marks are no parameters."""
    run(by_autograd(torch.tensor(2.0)), lift=Extension())


def distance(x: Tensor) -> Tensor:
    return (x * (1 - x)).prod(-1, keepdim=True)


def test_data_outside_of_the_box_warn():
    x = torch.rand(10, 2, dtype=torch.float64)
    x[:3, 1] += 5

    with pytest.warns(UserWarning, match="3 points of term 1 of `terms` are outside of the box"):
        run(distance=distance, terms=[(fit, (x[3:], x[3:, :1])), (fit, (x, x[:, :1]))])


INSIDE = {
    "on the sides": (fit, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1 + 1e-9, 0.5]]), []),
    "in other units": (lambda model, x, y: model(x / 10) - y, torch.tensor([[5.0, 7.0]] * 3), []),
    "in a periodic coordinate": (fit, torch.tensor([[5.0, 0.5]] * 3), [0]),
}


@pytest.mark.parametrize("case", INSIDE)
@silent
def test_data_inside_of_the_box_do_not_warn(case):
    function, x, periodic = INSIDE[case]
    x = x.double()

    run(distance=lambda x: x[..., 1:] * (1 - x[..., 1:]), periodic=periodic, terms=[(function, (x, x[:, :1]))])


@silent
def test_a_flux_does_not_warn_of_its_derivatives(monkeypatch):
    monkeypatch.setattr(api, "_warned", set())  # other tests may have warned already
    points, normals = side_points(*UNIT, 5, sides=[(0, "high")])
    distance = BoxDistance(*UNIT, sides=[(0, "low"), (1, "low"), (1, "high")])

    run(distance=distance, terms=[robin(points, normals, 0.0, 1.0)])


@pytest.mark.filterwarnings("ignore:Step refused")
def test_a_training_that_stalls_far_from_a_solution_warns():
    message = r"stalled at .* of the residual of an untrained.*`continuation=`.*`network=`"

    with pytest.warns(UserWarning, match=message):
        result = run(lambda model, x: 1 + 0 * model(x), steps=200)  # no step lowers it

    assert "stalled" in result.notes[-1]


def test_a_training_that_is_out_of_time_far_from_a_solution_warns():
    with pytest.warns(UserWarning, match="The budget ended at .* or more `seconds`"):
        run(steps=None, seconds=1e-6)


@silent
def test_a_number_of_steps_is_noted_without_a_warning():
    result = run()

    assert "The budget ended" in str(result)


def test_a_network_of_unit_size_is_too_large_for_a_tiny_solution():
    result = run(lambda model, x: poisson(model, x) - 1 + 1e-8, steps=12)

    assert result.error > 1
    assert any("estimated error" in note for note in result.notes)


def beam(factor: float, steps: int):
    """Return the solution of a cantilever, factor u_xxxx = 10, and its relative error."""

    def equation(model, x):
        return factor * jet(model, x, order=4)[4][0] - 10

    def free_end(model, x):
        _, _, second, third = jet(model, x, order=3)
        return torch.cat([second[0], third[0]], 1)

    terms = [(free_end, torch.ones(1, 1, dtype=torch.float64), 100.0)]
    result = solve(equation, [0], [1], distance=lambda x: x**2, terms=terms, steps=steps, progress=False)
    x = torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(1)
    exact = 10 / factor * x**2 * (x**2 + 6 - 4 * x) / 24
    return result, ((result.model(x) - exact).norm() / exact.norm()).item()


def test_a_condition_that_a_large_equation_drowns_is_noted(monkeypatch):
    monkeypatch.setattr("peft_lotra.pde.marching.FIRST_COUNTS", {})  # polynomials have no residual at all
    drowned, wrong = beam(2e3, steps=12)
    met, right = beam(1.0, steps=12)

    assert wrong > 0.3
    assert any("Term 0 of `terms` ends at" in note for note in drowned.notes)
    assert right < 0.01
    assert not any("Term" in note for note in met.notes)


def test_a_solution_is_continued_from_a_copy():
    first = run(steps=3)
    state = copy.deepcopy(first.model.state_dict())

    second = run(network=first.model, steps=3)

    torch.testing.assert_close(first.model.state_dict(), state, rtol=0, atol=0)
    assert second.first_residual == pytest.approx(first.residual)
    assert second.model.state_dict().keys() == state.keys()  # the conditions are applied once


def test_adapters_around_the_conditions_are_refused():
    first = run(network=KAN([2, 4, 1], norm="tanh"))
    adapter = get_peft_model(first.model, LoTRAConfig(r=2))

    with pytest.raises(ValueError, match=r"`network` wraps a solution.*`result.model.kan`"):
        run(network=adapter)


class Clamped(nn.Module):
    """Piecewise linear without a module of torch that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).clamp(-0.5, 0.5))


PIECEWISE_LINEAR = {
    "ReLU": lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)),
    "LeakyReLU": lambda: nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)),
    "behind periodic features": lambda: nn.Sequential(
        BoxFeatures(*UNIT, periodic=[0]), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)
    ),
    "a class of one's own": Clamped,
    "splines of degree 1": lambda: KAN([2, 4, 1], 5, 1),
}


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
@pytest.mark.filterwarnings("ignore:.*no closed form", "ignore:Splines of degree 1")
def test_a_network_with_kinks_warns(name):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="`network` has a kink or a jump.*without ReLU"):
        run(network=PIECEWISE_LINEAR[name](), distance=lambda x: x[..., 1:])


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus])
@silent
def test_a_smooth_network_does_not_warn(activation):
    torch.manual_seed(0)
    run(network=nn.Sequential(nn.Linear(2, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1)))


WRONG = {
    "`distance` is zero everywhere": {"distance": 0.0},
    "`distance` is zero everywhere, ": {"distance": lambda x: 0 * x[..., :1]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message):
    with pytest.raises(ValueError, match=message):
        run(**WRONG[message])


def test_kinks_outside_of_the_shape_do_not_count():
    hole = disk((0.5, 0.5), 0.3)
    shape = polygon([(0, 0), (1, 0), (1, 1), (0, 1)]) - hole
    conditions = {"distance": shape.distance, "inside": shape.inside}

    def lift(x: Tensor) -> Tensor:
        return (hole.inside(x) & (x[..., 0] > 0.5)).to(x).unsqueeze(-1)  # a jump in the hole

    with pytest.warns(UserWarning, match="`lift` has a kink"):
        run(**conditions, lift=lambda x: torch.relu(x[..., :1] - 0.15))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(**conditions, lift=lift)
