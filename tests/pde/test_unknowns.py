# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import refuses
from residuals import fit
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.pde import BoxDistance, solve
from peft_lotra.pde.solution import Solution
from peft_lotra.pde.unknowns import Estimate


RATE = 1.5
TIMES = torch.linspace(0.1, 2, 20, dtype=torch.float64).unsqueeze(1)
DECAYED = torch.exp(-RATE * TIMES)
NOISE = torch.randn(len(TIMES), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISY = DECAYED + 0.02 * NOISE


def decay(model: nn.Module, x: Tensor, rate: Tensor) -> Tensor:  # u' = -rate u, u(0) = 1
    u, (du,), _ = jet(model, x)
    return du + rate * u


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))


def solved(equation=decay, *, unknowns=None, terms=None, values=DECAYED, steps=30, **options) -> Solution:
    options = {"network": small(), "distance": lambda x: x, "lift": 1.0, "progress": False} | options
    unknowns = {"rate": 1.0} if unknowns is None else unknowns
    terms = [(fit, (TIMES, values))] if terms is None else terms
    return solve(equation, [0], [2], terms=terms, unknowns=unknowns, steps=steps, **options)


@pytest.fixture(scope="module")
def exact() -> Solution:
    """The solution from data without noise."""
    return solved(steps=50)


@pytest.fixture(scope="module")
def noisy() -> Estimate:
    """The estimate from data with noise."""
    return solved(values=NOISY).unknowns["rate"]


def test_a_constant_is_estimated_from_exact_data(exact):
    assert exact.unknowns["rate"].value == pytest.approx(RATE, rel=1e-4)
    assert 0 < exact.unknowns["rate"].error < 1e-3


def test_the_error_by_noise_is_the_error_of_nonlinear_regression(noisy):
    rate = torch.tensor(RATE, dtype=torch.float64)
    for _ in range(10):  # Gauss-Newton with the exact solution
        effects = -TIMES * torch.exp(-rate * TIMES)
        residuals = NOISY - torch.exp(-rate * TIMES)
        rate = rate + (residuals * effects).sum() / effects.square().sum()
    variance = residuals.square().sum() / (len(TIMES) - 1)
    error = (variance / effects.square().sum()).sqrt().item()

    assert noisy.error == pytest.approx(error, rel=0.1)
    assert abs(noisy.value - rate.item()) < 0.1 * error


def test_a_network_that_could_bend_to_the_noise_does_not():
    """Ten data of a diffusion: with a network that follows their noise, the estimate is five standard errors off."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[1:-1]
    shape = torch.sin(math.pi * x)
    values = math.exp(-1) * shape.unsqueeze(1)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(104), dtype=torch.float64)
    values = values + 0.01 * values.square().mean().sqrt() * noise

    def diffusion(model: nn.Module, x: Tensor, rate: Tensor) -> Tensor:  # u = exp(-t) sin(pi x) for the rate 1
        _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return u_t - rate * u_xx + torch.exp(-x[:, 1:]) * torch.sin(math.pi * x[:, :1]) * (1 - math.pi**2)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    box = (-1, 0), (1, 1)
    sides = [(0, "low"), (0, "high"), (1, "low")]
    result = solve(
        diffusion,
        *box,
        network=network,
        distance=BoxDistance(*box, sides=sides),
        lift=lambda x: torch.sin(math.pi * x[..., :1]),
        terms=[(fit, (torch.stack([x, torch.ones_like(x)], 1), values))],
        unknowns={"rate": 2.0},
        steps=40,
        progress=False,
    )

    # the amplitude at t = 1 as a function of the rate, and its slope
    def amplitude(rate: float) -> float:
        decay = rate * math.pi**2
        forced = (math.pi**2 - 1) / (decay - 1)
        return (1 - forced) * math.exp(-decay) + forced * math.exp(-1)

    fitted = (values.squeeze(1) @ shape / shape.square().sum()).item()
    slope = (amplitude(1.001) - amplitude(0.999)) / 0.002
    misfit = values.squeeze(1) - fitted * shape
    error = (misfit.square().sum() / (9 * shape.square().sum())).sqrt().item() / abs(slope)
    regression = 1 + (fitted - amplitude(1.0)) / slope
    assert result.unknowns["rate"].value == pytest.approx(regression, abs=0.2 * error)
    assert result.unknowns["rate"].error == pytest.approx(error, rel=0.2)


def test_a_callback_leaves_the_errors_of_the_estimates():
    estimate = solved(values=NOISY, callback=lambda result, record: None).unknowns["rate"]

    assert 0 < estimate.error < 0.1


def test_a_warm_start_is_compared_with_an_untrained_network(exact):
    """Its own residual is small already, and a share of it would call a good solution unsolved."""
    warm = solved(values=NOISY, network=exact.model, unknowns={"rate": 1.499}, steps=3)

    assert warm.residual < 0.02
    assert not any("untrained network" in note for note in warm.notes)


@pytest.mark.parametrize("bounds", [(0, None), (None, 5), (0.5, 3.0), (None, None)])
def test_bounds_change_neither_the_estimate_nor_its_error(noisy, bounds):
    estimate = solved(values=NOISY, unknowns={"rate": (1.0, *bounds)}).unknowns["rate"]

    assert estimate == pytest.approx(noisy, rel=0.02)


def test_a_constant_stays_between_its_bounds():
    rates = []

    def equation(model: nn.Module, x: Tensor, rate: Tensor) -> Tensor:
        rates.append(rate.detach().clone())
        return decay(model, x, rate)

    estimate = solved(equation, unknowns={"rate": (1.0, 0.5, 1.2)}).unknowns["rate"]

    values = torch.stack([rate for rate in rates if not torch._C._functorch.is_functorch_wrapped_tensor(rate)])
    assert 0.5 <= values.min() and values.max() <= 1.2
    assert estimate.value == pytest.approx(1.2, abs=0.1)


def test_a_constant_may_start_at_zero_and_be_zero():
    def equation(model: nn.Module, x: Tensor, source: Tensor) -> Tensor:
        u, (du,), _ = jet(model, x)
        return du + RATE * u - source

    source = solved(equation, unknowns={"source": 0.0}, values=NOISY).unknowns["source"]

    assert 0 < source.error < 0.1
    assert abs(source.value) < 3 * source.error


def test_a_constant_that_the_data_do_not_determine_has_a_huge_error():
    def equation(model: nn.Module, x: Tensor, rate: Tensor, loss: Tensor) -> Tensor:
        return decay(model, x, rate + loss)  # the data determine only their sum

    with pytest.warns(UserWarning, match="`unknowns` is not known: the data do not tell it"):
        result = solved(equation, unknowns={"rate": 1.0, "loss": 0.0}, values=NOISY)

    rate, loss = result.unknowns.values()
    assert rate.value + loss.value == pytest.approx(RATE, rel=0.02)
    assert min(rate.error, loss.error) > 100


def test_without_data_the_error_is_huge():
    result = solved(terms=[], steps=10)

    assert result.unknowns["rate"].error > 1e6


def test_functions_of_terms_get_the_constants_that_they_name():
    gain = 3.0

    def measured(model: nn.Module, x: Tensor, y: Tensor, *, gain: Tensor) -> Tensor:
        return gain * model(x) - y

    terms = [(fit, (TIMES, DECAYED)), (measured, (TIMES, gain * DECAYED))]
    result = solved(unknowns={"rate": 1.0, "gain": 1.0}, terms=terms)

    assert result.unknowns["rate"].value == pytest.approx(RATE, rel=1e-3)
    assert result.unknowns["gain"].value == pytest.approx(gain, rel=1e-3)


def test_a_function_with_any_keyword_argument_gets_all_constants():
    names = set()

    def anything(model: nn.Module, x: Tensor, **constants: Tensor) -> Tensor:
        names.update(constants)
        assert all(constant.shape == () and constant.dtype == torch.float64 for constant in constants.values())
        return decay(model, x, constants["rate"] + constants["loss"])

    solved(anything, unknowns={"rate": 1.0, "loss": 0.1}, steps=2)

    assert names == {"rate", "loss"}


def test_residuals_by_autograd_have_constants():
    def by_autograd(model: nn.Module, x: Tensor, rate: Tensor) -> Tensor:
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return du + rate * u

    assert solved(by_autograd).unknowns["rate"].value == pytest.approx(RATE, rel=1e-3)


def test_continuation_gives_the_parameter_before_the_constants():
    def forced(model: nn.Module, x: Tensor, force: float, rate: Tensor) -> Tensor:
        return decay(model, x, rate) - force

    result = solved(forced, continuation=(0.5, 0.0), steps=30)

    assert result.unknowns["rate"].value == pytest.approx(RATE, rel=1e-3)


def test_under_inference_mode_and_with_the_same_seed_the_estimate_is_the_same():
    options = {"steps": 3, "network": None, "seed": 3}
    expected = solved(**options).unknowns["rate"]

    with torch.inference_mode():
        estimate = solved(**options).unknowns["rate"]

    assert estimate == pytest.approx(expected, rel=1e-6)


def test_the_report_has_the_constants(exact):
    report = json.loads(json.dumps(exact.as_dict()))

    assert isinstance(exact.unknowns["rate"], Estimate)
    assert report["unknowns"]["rate"].keys() == {"value", "error"}
    assert "rate = " in str(exact)
    assert " +- " in str(exact)


def cut_off(model: nn.Module, x: Tensor, rate: Tensor) -> Tensor:
    return decay(model, x, rate.detach())


WRONG = {
    "must be a number, or": lambda: solved(unknowns={"rate": (1.0, 0)}),
    "`unknowns` has 'loss', but neither": lambda: solved(unknowns={"rate": 1.0, "loss": 1.0}),
    "missing a required argument: 'rate'": lambda: solved(unknowns={"loss": 1.0}),
    "starts at 1, which is not between 2 and inf": lambda: solved(unknowns={"rate": (1, 2, None)}),
    "starts at 1, which is not between -inf and 1": lambda: solved(unknowns={"rate": (1, None, 1)}),
    "starts at 1, which is not between 2 and 0": lambda: solved(unknowns={"rate": (1, 2, 0)}),
    "`unknowns\\['rate'\\]` is nan": lambda: solved(unknowns={"rate": math.nan}),
    "`unknowns\\['rate'\\]` is None": lambda: solved(unknowns={"rate": None}),
    "`unknowns` has 'rate', but no residual depends on it": lambda: solved(cut_off),
}


test_wrong_constants_are_named_before_the_training = refuses(WRONG)


def test_a_condition_with_a_weight_is_no_datum(noisy):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    condition = (fit, (zero, zero + 1), 100.0)
    data = (fit, (TIMES, NOISY))

    estimate = solved(distance=1.0, lift=0.0, terms=[condition, data]).unknowns["rate"]

    assert estimate.value == pytest.approx(noisy.value, abs=noisy.error / 2)
    assert estimate.error == pytest.approx(noisy.error, rel=0.2)


def test_the_error_is_estimated_at_points_inside_of_the_shape():
    def equation(model: nn.Module, x: Tensor, rate: Tensor) -> Tensor:
        return decay(model, x, rate) * (2 - x).sqrt()  # NaN beyond 2

    conditions = {"distance": lambda x: x, "lift": 1.0, "inside": lambda x: x[:, 0] < 1.9}
    data = (fit, (TIMES[:15], DECAYED[:15]))
    options = {"network": small(), "steps": 30, "progress": False}

    result = solve(equation, [0], [3], terms=[data], unknowns={"rate": 1.0}, **conditions, **options)

    assert result.unknowns["rate"].value == pytest.approx(RATE, rel=1e-2)
    assert math.isfinite(result.unknowns["rate"].error)


def test_a_spike_that_no_network_solves_does_not_bend_a_constant():
    def decay_with_a_spike(model, x, rate):
        return decay(model, x, rate) + 3 * torch.exp(-((x - 1.05) / 0.003).square())

    result = solved(decay_with_a_spike, steps=100)

    assert result.unknowns["rate"].value == pytest.approx(RATE, rel=1e-3)


def test_callbacks_see_the_constants_and_stop_with_numpy_too():
    rates = []

    def callback(result, step):
        rates.append(result.unknowns["rate"])
        return np.True_ if len(rates) == 3 else None

    solved(callback=callback)

    assert len(rates) == 3
    assert rates[0].value == pytest.approx(1.0, abs=0.5)
    assert math.isnan(rates[0].error)


def test_a_constant_that_reaches_its_bound_is_returned_with_a_note():
    """By rounding, the bound lies beyond the end in the coordinate that is trained."""

    def equation(model, x, *, k):
        return jet(model, x)[2][0] + k

    def difference(model, x, u):
        return model(x) - u

    x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).unsqueeze(1)
    u = 2 * x * (1 - x) + 0.001 * torch.cos(40 * x)  # of k = 4
    result = solve(
        equation,
        [0],
        [1],
        distance=BoxDistance([0], [1]),
        terms=[(difference, (x, u))],
        unknowns={"k": (2.0, 0.6, 3.95)},
        steps=40,
        progress=False,
    )

    assert result.unknowns["k"].value == pytest.approx(3.95)
    assert "ends at its bound" in result.notes[0]
