# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""The Jacobian by layers, compared with `torch.func.vmap`."""

import copy

import pytest
import torch
from helpers import adapt, relative
from peft import LoraConfig, get_peft_model
from residuals import problem
from stand_ins import LAYER_KINDS
from torch import nn

from peft_lotra.kan import KAN, KANLinear, hessian, jet
from peft_lotra.least_squares.jacobian import MOST_COLUMNS
from peft_lotra.pde import HardConstraint


ROWS = 70


def points(rows=ROWS, dtype=torch.float64):
    return torch.rand(rows, 2, dtype=dtype) * 2.4 - 1.2  # some outside of the grids


def network(**options):
    return KAN([2, 5, 4, 2], dtype=torch.float64, **options)


def check(model, function, *rows, by_layers=True):
    """Check that the Jacobian by layers equals the one by `torch.func.vmap`, or that there is none by layers."""
    squares = problem(model, [(function, rows or (points(),))])
    for term, chunk in squares.chunks():
        jacobian = squares.jacobian(term, chunk)
        assert term.trial.by_layers is by_layers
        term.trial.by_layers = False
        expected = squares.jacobian(term, chunk)
        assert jacobian.shape == expected.shape
        assert expected.any()
        assert relative(jacobian, expected) < 1e-12


# Residuals


def equation(model, x):
    u, (u_x, u_y), second = jet(model, x, collapse=True)
    return second - u**3 + u_x * u_y


def value(model, x):
    return model(x).square()


def weighted(model, x):
    u, du, second = jet(model, x, collapse=(1.0, -0.3))
    return second[:, 0] * u[:, 1] + du[0, :, 1]


def second_derivatives(model, x):
    u, _, d2u = hessian(model, x)
    return d2u[0, 0] * d2u[1, 1] - d2u[0, 1] ** 2 + u


def several(model, x):
    """A periodic condition, and the equation times the value."""
    side = x * torch.tensor([0.0, 1.0])
    left, right = side - 1, side + 1
    (u, du, _), (v, dv, _) = jet(model, left), jet(model, right)
    return torch.cat([u - v, du[0] - dv[0], equation(model, x) * model(x)], dim=-1)


# Models


def two_adapters(model):
    model = adapt(model, r=(2, 3, 4), alpha=0.7)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


def one_of_two_trained(model):
    model = two_adapters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name and "factor_in" not in name)
    return model


MODELS = {
    "dense": lambda: network(),
    "adapted": lambda: adapt(network(), r=(2, 3, 4)),
    "splines only": lambda: adapt(network(), r=3, alpha=1.7, adapt_residual=False),
    "two adapters": lambda: two_adapters(network()),
    "one of two": lambda: one_of_two_trained(network()),
    "core alone": lambda: adapt(network(), r=(2, 3, 4), train=["core"], init_weights="hosvd"),
    "factor_out alone": lambda: adapt(network(), r=(1, 3, 4), train=["factor_out"]),
    "one shape": lambda: adapt(network(), r=("full", "full", 1), alpha=1.7),
    "frozen norm": lambda: adapt(network(norm="layer")),
    "wide": lambda: adapt(KAN([2, 80, 80, 2], dtype=torch.float64), r=2),  # contracts its factors
    "wide with full modes": lambda: adapt(KAN([2, 80, 80, 2], dtype=torch.float64), r=("full", "full", 1)),
}


@pytest.mark.parametrize("residual", [value, several, weighted, second_derivatives])
@pytest.mark.parametrize("name", MODELS)
def test_dense_and_adapted_kans(name, residual):
    check(MODELS[name](), residual)


FOREIGN_KINDS = ["efficient-kan", "efficient-kan-no-scaler", "fast-kan", "faster-kan", "cheby-kan", "fourier-kan"]


def foreign_network(kind):
    layers = [LAYER_KINDS[kind](2, 4), LAYER_KINDS[kind](4, 2)]
    return adapt(nn.Sequential(*layers).double(), r=(2, 3, 4), alpha=0.7)


@pytest.mark.filterwarnings("ignore:Adapters have more")
@pytest.mark.parametrize("residual", [equation, weighted])
@pytest.mark.parametrize("kind", FOREIGN_KINDS)
def test_adapters_of_layers_of_other_libraries(kind, residual):
    """Rows come from the formula of a layer, unless it scales its edges."""
    check(foreign_network(kind), residual, points(20), by_layers=kind != "efficient-kan")


def frozen_bias():
    model = nn.Sequential(KAN([2, 4]), nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2)).double()
    model[1].bias.requires_grad_(False)
    return model


MLPS = {
    "MLP": lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.SiLU(), nn.Linear(5, 2)),
    "KAN and MLP": frozen_bias,
    "constrained": lambda: HardConstraint(MLPS["MLP"](), lambda x: 1 - x[..., :1] ** 2),
}


@pytest.mark.parametrize("residual", [equation, weighted, second_derivatives])
@pytest.mark.parametrize("name", MLPS)
def test_networks_with_linear_layers(name, residual):
    check(MLPS[name]().double(), residual)


@pytest.mark.parametrize("rows", [1, 2, 20, 300])  # few rows go by plain operations
def test_any_number_of_rows(rows):
    check(adapt(network()), several, points(rows))
    check(network(), equation, points(rows))


@pytest.mark.parametrize("residual, by_layers", [(equation, True), (value, False)])
def test_a_layer_that_is_used_twice(residual, by_layers):
    layer = KANLinear(2, 2, dtype=torch.float64)
    model = nn.Sequential(layer, KAN([2, 3, 2], dtype=torch.float64), layer)

    check(model, residual, by_layers=by_layers)


def test_a_parameter_that_two_layers_share():
    model = KAN([2, 2, 2], dtype=torch.float64)
    model.layers[1].spline_weight = model.layers[0].spline_weight

    check(model, several)


@pytest.mark.parametrize("repeats", [1, 20])
def test_points_on_the_knots(repeats):
    """Second derivatives of quadratic splines jump there. Residuals are the Jacobian times the parameters."""
    x = torch.tensor([[-1.0, -1], [1, 1], [-0.6, 0.2], [0.2, -0.2], [1.4, 0.1]], dtype=torch.float64)
    model = KAN([2, 1], dtype=torch.float64, spline_order=2)
    squares = problem(model, [(lambda model, x: jet(model, x, collapse=True)[2], x.repeat(repeats, 1))])

    jacobian = squares.jacobian(*next(squares.chunks()))

    torch.testing.assert_close(jacobian @ squares.start, squares.residuals(squares.start))


# What is not by layers


def hooked():
    model = network()
    model.layers[1].register_forward_hook(lambda *arguments: 2 * arguments[-1])
    return model


def with_replaced_forward():
    model = adapt(network())
    layer = model.get_base_model().layers[1]
    layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    return model


class Around(nn.Module):
    """A network with parameters of its own around a KAN."""

    def __init__(self):
        super().__init__()
        self.kan = network()
        self.speed = nn.Parameter(torch.tensor([0.7, 1.3], dtype=torch.float64))

    def forward(self, x):
        return self.kan(x)


def lora():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["spline_weight"], init_lora_weights=False)
    return get_peft_model(network(), config)


NOT_BY_LAYERS = {
    "a hook": (hooked, value),
    "a replaced forward": (with_replaced_forward, value),
    "many values in a row": (lambda: KAN([2, 3, MOST_COLUMNS + 1], dtype=torch.float64), value),
    "no KAN": (lambda: MLPS["MLP"]().double(), value),
    "LoRA": (lora, equation),
    "trained norm": (lambda: network(norm="layer"), equation),
    "a layer alone": (lambda: network().layers[0], value),
    "inputs": (Around, lambda model, x: jet(model.kan, x * model.speed)[0]),
    "factor": (Around, lambda model, x: equation(model.kan, x) * model.speed),
    "penalty": (
        network,
        lambda model, x: equation(model, x) + model.layers[0].spline_weight.sum() + model.layers[2].base_weight[0, 0],
    ),
    "turned around": (network, lambda model, x: model(x.flip(0)).flip(0)),
    "as one": (network, lambda model, x: jet(model, torch.cat([x, x + 0.1]))[0].view(2, -1, 2).sum(0)),
    "transform": (
        network,
        lambda model, x: torch.func.jvp(lambda p: jet(model, p)[0], (x,), (torch.ones_like(x),))[1],
    ),
    "scaled weights": (
        network,
        lambda model, x: torch.func.functional_call(
            model, {"layers.0.spline_weight": 2 * model.layers[0].spline_weight}, (x,)
        ),
    ),
}


@pytest.mark.parametrize("name", NOT_BY_LAYERS)
def test_what_computes_more_than_its_layers_has_no_jacobian_by_layers(name):
    build, residual = NOT_BY_LAYERS[name]

    check(build(), residual, by_layers=False)
