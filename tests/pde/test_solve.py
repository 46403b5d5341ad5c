# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from helpers import refuses
from pde_problems import by_autograd, error, line, poisson
from peft import get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, KANLinear, jet
from peft_lotra.pde import BoxDistance, solve
from peft_lotra.pde.features import BoxFeatures


def solved(residual=poisson, low=(0.0,), high=(10.0,), *, distance=line, steps=8, seed=0, **options):
    torch.manual_seed(seed)
    if "network" not in options:  # a small one
        periodic = options.get("periodic", ())
        inputs = len(low) + (len(periodic) if isinstance(periodic, list) else 0)
        options["network"] = KAN([inputs, 5, 1], 6, 4, norm="tanh")
    return solve(residual, low, high, distance=distance, steps=steps, seed=seed, progress=False, **options)


def decay(model: nn.Module, x: Tensor, rate: float) -> Tensor:
    """Return the residual of the heat equation u_t = rate u_xx."""
    _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t - rate * u_xx


def test_a_box_far_from_the_grid_is_scaled():
    result = solved()

    assert error(result, lambda x: line(x) / 2) < 1e-3
    assert len(result.history) == 8
    assert result.residual < 1e-2 * result.first_residual
    assert result.model(torch.ones(3, 1, dtype=torch.float64)).shape == (3, 1)


@pytest.mark.parametrize(("size", "time"), [(100.0, 1.0), (1e-6, 1.0), (1.0, 1e6)])
def test_the_units_of_the_solution_and_of_the_time_do_not_matter(size, time):
    def fading(model, t):  # u' = -2 u / time
        u, (du,), _ = jet(model, t)
        return du + 2 * u / time

    result = solve(fading, [0], [time], distance=lambda t: t, lift=size, steps=16, progress=False)

    assert error(result, lambda t: size * torch.exp(-2 * t / time)) < 1e-3


def test_a_tiny_load_has_an_accurate_solution():
    def loaded(model, x):
        return jet(model, x)[2][0] + 1e-8

    result = solve(loaded, [0], [10], distance=line, steps=12, progress=False)

    assert error(result, lambda x: 1e-8 * line(x) / 2) < 1e-3


def by_autograd_marked(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    return by_autograd(model, x)


def by_autograd_of_a_copy(model: nn.Module, x: Tensor) -> Tensor:
    """Return a residual without the graph of the last derivative, which training needs."""
    x = x.clone().requires_grad_(True)
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.autograd.grad(du.sum(), x)[0] + 1


NETWORKS = {
    "KAN": lambda: KAN([1, 5, 1], 6, 4, norm="tanh"),
    "MLP": lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)),
}


def solved_in_four_steps(residual, name):
    torch.manual_seed(0)
    return solved(residual, network=NETWORKS[name](), steps=4)


@pytest.fixture(scope="module", params=NETWORKS)
def expected_by_jet(request):
    """The name of a network, and its solution by a residual with `jet`."""
    return request.param, solved_in_four_steps(poisson, request.param)


@pytest.mark.parametrize("residual", [by_autograd, by_autograd_marked, by_autograd_of_a_copy])
def test_residuals_by_autograd_are_trained_as_those_by_jet(residual, expected_by_jet):
    name, expected = expected_by_jet

    with torch.no_grad():  # of the caller
        result = solved_in_four_steps(residual, name)

    assert result.first_residual == pytest.approx(expected.first_residual, rel=1e-6)
    assert result.history[-1].loss == pytest.approx(expected.history[-1].loss, rel=1e-2)


def test_a_residual_by_autograd_with_a_parameter_and_two_coordinates():
    box = (0.0, 0.0), (1.0, 1.0)

    def heat(model: nn.Module, x: Tensor, rate: float) -> Tensor:
        (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        return du[:, 1:] - rate * second[:, :1]

    options = {"distance": BoxDistance(*box), "lift": lambda x: torch.sin(math.pi * x[:, :1])}
    options |= {"continuation": (0.5, 1.0), "steps": 7}

    result = solved(heat, *box, network=KAN([2, 3, 1], 3, 4, norm="tanh"), **options)
    torch.manual_seed(0)
    expected = solved(decay, *box, network=KAN([2, 3, 1], 3, 4, norm="tanh"), **options)

    assert result.history[-1].loss == pytest.approx(expected.history[-1].loss, rel=0.05)


def test_the_same_seed_gives_the_same_network_and_points():
    state = torch.get_rng_state()

    losses = []
    for seed in (1, 1, 2):
        result = solve(poisson, [0], [10], distance=line, steps=2, seed=seed, progress=False)
        losses.append(result.history[-1].loss)

    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


def test_continuation_and_periodic_coordinates():
    box = (0.0, 0.0), (2 * math.pi, 1.0)
    rates = []

    def residual(model: nn.Module, x: Tensor, rate: float) -> Tensor:
        rates.append(rate)
        return decay(model, x, rate)

    def start(x: Tensor) -> Tensor:
        return torch.sin(x[:, :1])

    options = {"distance": lambda x: x[:, 1:], "lift": start, "periodic": [0]}
    result = solved(residual, *box, continuation=(0.1, 1.0), steps=10, **options)

    assert rates[0] == 0.1
    assert rates[-1] == 1.0
    assert [phase.parameter for phase in result.phases[:2]] == pytest.approx([0.1, 10**-0.8])
    assert error(result, lambda x: torch.exp(-x[:, 1:]) * start(x)) < 0.02
    ends = torch.tensor([[0.0, 0.4], [2 * math.pi, 0.4]], dtype=torch.float64)
    slopes = jet(result.model, ends)[1]
    torch.testing.assert_close(slopes[:, 0], slopes[:, 1], rtol=0, atol=1e-9)


def test_a_path_through_zero_has_equal_steps():
    def residual(model: nn.Module, x: Tensor, p: float) -> Tensor:
        return poisson(model, x) + p * model(x)

    result = solved(residual, continuation=(-0.01, 0.01), steps=7)

    assert [phase.parameter for phase in result.phases[:3]] == pytest.approx([-0.01, -0.006, -0.002])


def mlp() -> nn.Module:
    return NETWORKS["MLP"]()


TRAINED_IN_PLACE = {
    "MLP": mlp,
    "KAN on the grid of the box": lambda: KAN([1, 4, 1], grid_range=(0, 10)),
    "features and KAN": lambda: nn.Sequential(BoxFeatures([0], [10]), KAN([1, 4, 1])),
}


@pytest.mark.parametrize("name", TRAINED_IN_PLACE)
def test_a_given_network_is_trained_in_place(name):
    torch.manual_seed(0)
    network = TRAINED_IN_PLACE[name]()

    result = solved(network=network)

    assert any(module is network for module in result.model.modules())
    assert error(result, lambda x: line(x) / 2) < 1e-2


def test_a_trained_network_goes_on():
    result = solved(steps=2)

    assert solved(network=result.model.kan, steps=2).first_residual == pytest.approx(result.residual)


def test_steps_on_finer_grids_that_do_not_help_are_undone():
    network = KAN([1, 1], 3, 4)  # solves it exactly

    def exact(model: nn.Module, x: Tensor) -> Tensor:
        return jet(model, x)[2][0] - x**2

    ends = torch.tensor([[0.0], [10.0]])
    result = solved(exact, distance=1.0, terms=[(lambda model, x: model(x), ends)], network=network)

    assert network.layers[0].grid_size == 6
    assert result.residual <= min(phase.held for phase in result.phases) ** 0.5 * 1.001


def test_the_grids_of_adapted_networks_and_of_solutions_stay():
    network = KAN([1, 4, 1], 4, norm="tanh")
    base = solved(network=network)
    assert network.layers[0].grid_size == 8

    adapter = get_peft_model(copy.deepcopy(base.model.kan), LoTRAConfig(r=2))
    results = [solved(network=adapter), solved(network=base.model)]

    for result in results:
        grids = [layer.grid_size for layer in result.model.modules() if isinstance(layer, KANLinear)]
        assert grids == [8, 8]
        assert not any("grid" in note for note in result.notes)


def test_activations_outside_of_their_grids_are_reported():
    network = KAN([1, 4, 1])
    with torch.no_grad():
        network.get_parameter("layers.0.base_weight").fill_(20.0)

    with pytest.warns(UserWarning, match="outside of its grid"):
        result = solved(network=network, steps=2)

    assert "outside of its grid" in str(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved(steps=2)


def test_the_budget_ends_the_training():
    assert len(solved(steps=2).history) == 2

    result = solve(poisson, [0], [10], distance=line, seconds=1e-6, progress=False)

    assert len(result.history) == 1  # no machine takes two steps in it
    assert [phase.reason for phase in result.phases] == ["budget"]


def test_a_callback_sees_each_step_and_ends_the_training():
    box = (0.0, 0.0), (1.0, 1.0)
    counts = []

    def callback(solution, record) -> bool:
        counts.append(len(solution.history))
        assert record is solution.history[-1]
        return len(counts) == 3

    options = {"distance": BoxDistance(*box), "continuation": (0.5, 1.0), "steps": 20}
    result = solved(decay, *box, callback=callback, **options)

    assert counts == [1, 2, 3]
    assert len(result.history) == 3
    assert result.phases[-1].reason == "callback"


def test_the_report_fits_on_a_screen_and_is_read_from_json():
    result = solved(steps=2)

    report = str(result)
    assert "coarse" in report
    assert "parameters" in report
    assert len(report.splitlines()) < 12
    assert json.loads(json.dumps(result.as_dict()))["phases"][0]["steps"] == 1


def test_a_solution_is_drawn_on_a_line_and_in_a_square():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    box = (0.0, 0.0), (1.0, 1.0)

    line_result = solved(steps=1)
    square_result = solved(lambda model, x: decay(model, x, 1.0), *box, distance=BoxDistance(*box), steps=1)

    assert line_result.plot(11).axes[0].get_lines()
    assert square_result.plot(11).axes[0].collections
    plt.close("all")


def test_terms_instead_of_exact_conditions():
    ends = torch.tensor([[0.0], [10.0]], dtype=torch.float64)

    result = solved(distance=1.0, terms=[(lambda model, x: model(x), ends)], steps=20)

    assert error(result, lambda x: line(x) / 2) < 1e-2


def test_under_inference_mode_the_solution_is_the_same():
    def run():
        ends = torch.tensor([[0.0], [10.0]], dtype=torch.float64)
        terms = [(lambda model, x: model(x), ends)]
        return solved(by_autograd, distance=BoxDistance([0], [10]), terms=terms, network=None, steps=2)

    expected = run()
    with torch.inference_mode():
        result = run()

    assert result.history[-1].loss == pytest.approx(expected.history[-1].loss, rel=1e-6)


def test_a_network_that_was_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        network = mlp()

    with pytest.raises(ValueError, match="made under `torch.inference_mode"):
        solved(network=network)


def test_a_term_with_nan_is_refused_before_the_first_step():
    network = mlp()
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    rows = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [math.nan], [3.0]])

    def data(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x) - y

    with pytest.raises(ValueError, match=r"1 of 3 in residual term 1 \(data\), first in row 1: \[2.0\], \[nan\]"):
        solved(network=network, terms=[(data, rows)])

    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


WRONG = {
    "`distance` is zero on no side": lambda: solved(distance=lambda x: 1 + x),
    "`low` is": lambda: solved(low=(0.0,), high=(0.0,)),
    "expects a last dimension of 2": lambda: solved(network=KAN([2, 4, 1])),
    "must be a network": lambda: solved(network=KAN),
    "`distance` returns": lambda: solved(distance=lambda x: x[:, 0]),
    "`residual` is None": lambda: solved(None),
    r"`residual` returns torch.float64 of shape \(\)": lambda: solved(lambda model, x: poisson(model, x).mean()),
    "`residual` returns tuple": lambda: solved(lambda model, x: jet(model, x)),
    "depend on other rows": lambda: solved(lambda model, x: poisson(model, x) - model(x).mean()),
    "squeeze one of them": lambda: solved(lambda model, x: poisson(model, x) - x[:, 0]),
    "NaN or infinite: 1000 of 1000 in residual term 0": lambda: solved(lambda model, x: poisson(model, x) / 0),
    "`residual` returns torch.int64": lambda: solved(lambda model, x: poisson(model, x).long()),
    "`residual` returns torch.complex128": lambda: solved(lambda model, x: 1j * poisson(model, x)),
    "`residual` returns NoneType": lambda: solved(lambda model, x: None),
    "`residual` is called with 2": lambda: solved(decay),
    "`residual` is called with 3": lambda: solved(continuation=(1.0, 2.0), steps=8),
    r"`terms\[0\]` is <function .* must be \(function, rows\)": lambda: solved(terms=(poisson, torch.zeros(3, 1))),
    r"`terms\[0\]` is \(\), but": lambda: solved(terms=[()]),
    "`terms` is 5, but must be a list": lambda: solved(terms=5),
    "`continuation` is 3, but must be two numbers": lambda: solved(decay, continuation=3),
    r"`continuation` is \(1,\), but must be two": lambda: solved(decay, continuation=(1,)),
    "`periodic` is True, but must be a list": lambda: solved(periodic=True),
    "`continuation` is 1j": lambda: solved(decay, continuation=(1j, 1.0)),
    "returns torch.complex128": lambda: solved(distance=lambda x: 1j * line(x)),
    r"`periodic` has True": lambda: solved(low=(0.0, 0.0), high=(1.0, 1.0), periodic=[True, False]),
    "`steps` is": lambda: solved(decay, continuation=(1.0, 2.0), steps=3),
    "`callback` is called with 2": lambda: solved(callback=lambda: None),
    "`seconds` is": lambda: solve(poisson, [0], [1], distance=line, seconds=0),
    r"`periodic` has 1": lambda: solved(periodic=[1]),
    "the network was made with": lambda: solved(network=nn.Sequential(BoxFeatures([0], [10]), mlp()), periodic=[0]),
}


test_wrong_arguments_change_nothing = refuses(WRONG)


@pytest.mark.parametrize(
    "options",
    [
        {"network": nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))},
        {"network": None, "lift": lambda x: torch.zeros_like(x).expand(-1, 2)},
        {"network": None, "distance": lambda x: line(x).expand(-1, 2)},
    ],
)
def test_two_unknown_functions_follow_from_the_network_or_from_columns(options):
    def equations(model: nn.Module, x: Tensor) -> Tensor:
        second = jet(model, x)[2][0]
        return second + torch.tensor([1.0, -1.0])

    result = solved(equations, steps=10, **options)

    assert result.residual < result.first_residual
    assert result.model(torch.zeros(1, 1, dtype=torch.float64)).shape == (1, 2)
