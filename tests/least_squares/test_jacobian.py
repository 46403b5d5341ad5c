# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""The Jacobian by layers beside that by `torch.func.vmap`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import adapt, relative
from peft import LoraConfig, get_peft_model
from residuals import problem
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra.kan import KAN, KANLinear, SlimKAN, hessian, jet
from peft_lotra.least_squares.jacobian import MOST_COLUMNS
from peft_lotra.pde import HardConstraint


ROWS = 70


def points(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(rows, 2, dtype=dtype) * 2.4 - 1.2  # some outside of the grids


def network(**options) -> KAN:
    return KAN([2, 5, 4, 2], dtype=torch.float64, **options)


def check(model: nn.Module, function: Callable, *rows: Tensor, by_layers: bool = True) -> None:
    """The Jacobian by layers is that by `torch.func.vmap`; or there is none by layers."""
    squares = problem(model, [(function, rows or (points(),))])
    for term, part in squares.chunks():
        found = squares.jacobian(term, part)
        assert term.trial.by_layers is by_layers
        term.trial.by_layers = False
        expected = squares.jacobian(term, part)
        assert found.shape == expected.shape and expected.any()
        assert relative(found, expected) < 1e-12


# Residuals


def equation(model: nn.Module, x: Tensor) -> Tensor:
    u, (u_x, u_y), second = jet(model, x, collapse=True)
    return second - u**3 + u_x * u_y


def value(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square()


def weighted(model: nn.Module, x: Tensor) -> Tensor:
    u, du, second = jet(model, x, collapse=(1.0, -0.3))
    return second[:, 0] * u[:, 1] + du[0, :, 1]


def along_directions(model: nn.Module, x: Tensor) -> Tensor:
    _, du, d2u = jet(model, x, torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, -1.0]]))
    return torch.cat([du[0] * du[1], d2u[2], d2u[0]], dim=-1)


def second_derivatives(model: nn.Module, x: Tensor) -> Tensor:
    u, _, d2u = hessian(model, x)
    return d2u[0, 0] * d2u[1, 1] - d2u[0, 1] ** 2 + u


def several(model: nn.Module, x: Tensor) -> Tensor:
    """A periodic condition, the equation, and the value once more."""
    left, right = x * torch.tensor([0.0, 1.0]) - 1, x * torch.tensor([0.0, 1.0]) + 1
    (u, du, _), (v, dv, _) = jet(model, left), jet(model, right)
    return torch.cat([u - v, du[0] - dv[0], equation(model, x) * model(x)], dim=-1)


# Models


def two_adapters(model: nn.Module) -> nn.Module:
    model = adapt(model, r=(2, 3, 4), alpha=0.7)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.peft_config["other"].r = 2
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


def one_of_two_trained(model: nn.Module) -> nn.Module:
    model = two_adapters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name and "factor_in" not in name)
    return model


MODELS = {
    "dense": lambda: network(),
    "order 2": lambda: network(spline_order=2),
    "adapted": lambda: adapt(network(), r=(2, 3, 4)),
    "splines only": lambda: adapt(network(), r=3, alpha=1.7, adapt_residual=False),
    "ranks by layer": lambda: adapt(network(), r=1, rank_pattern={"layers.1": (4, 5, 9)}),
    "two adapters": lambda: two_adapters(network()),
    "one of two": lambda: one_of_two_trained(network()),
    "core alone": lambda: adapt(network(), r=(2, 3, 4), train=["core"], init_weights="hosvd"),
    "factor_out alone": lambda: adapt(network(), r=(1, 3, 4), train=["factor_out"]),
    "one shape": lambda: adapt(network(), r=("full", "full", 1), alpha=1.7),
    "one shape, splines only": lambda: adapt(network(), r=("full", "full", 1), adapt_residual=False),
    "full inputs": lambda: adapt(network(), r=(1, "full", 2)),
    "full basis": lambda: adapt(network(), r=(1, 1, "full")),
    "full outputs": lambda: adapt(network(), r=("full", 1, 2)),
    "dense update": lambda: adapt(network(), r="full"),
    "frozen norm": lambda: adapt(network(norm="layer")),
    "slim": lambda: SlimKAN([2, 5, 4, 3], ranks=(3, 2, 3), dtype=torch.float64),
    "slim and dense": lambda: SlimKAN([2, 5, 2], ranks=[None, (2, 2, 2)], dtype=torch.float64),
    "slim with full modes": lambda: SlimKAN([2, 5, 2], ranks=("full", "full", 2), dtype=torch.float64),
    "wide": lambda: adapt(KAN([2, 80, 80, 1], dtype=torch.float64), r=2),  # contracts its factors
    "wide with full modes": lambda: adapt(KAN([2, 80, 80, 1], dtype=torch.float64), r=("full", "full", 1)),
}


@pytest.mark.parametrize("residual", [equation, value, several])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, residual):
    check(MODELS[name](), residual)


FOREIGN_KINDS = ["efficient-kan", "efficient-kan-no-scaler", "fast-kan", "faster-kan", "cheby-kan", "fourier-kan"]


def foreign_network(kind: str) -> nn.Module:
    layers = [FAMILIES[kind](2, 4), FAMILIES[kind](4, 2)]
    return adapt(nn.Sequential(*layers).double(), r=(2, 3, 4), alpha=0.7)


@pytest.mark.filterwarnings("ignore:Adapters have more")
@pytest.mark.parametrize("residual", [equation, weighted])
@pytest.mark.parametrize("kind", FOREIGN_KINDS)
def test_adapters_of_layers_of_other_libraries(kind, residual):
    """Their rows come from the formulas of the layers, if no scale of the edges stands between."""
    check(foreign_network(kind), residual, points(20), by_layers=kind != "efficient-kan")


def frozen_bias() -> nn.Module:
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
def test_mlps(name, residual):
    check(MLPS[name]().double(), residual)


@pytest.mark.parametrize("residual", [weighted, along_directions, second_derivatives])
@pytest.mark.parametrize("name", ["dense", "two adapters"])
def test_residuals(name, residual):
    check(MODELS[name](), residual)


@pytest.mark.parametrize("rows", [1, 2, 20, 300])  # few by plain operations
def test_rows(rows):
    check(adapt(network()), several, points(rows))
    check(network(), equation, points(rows))


def test_a_layer_used_twice():
    for residual, by_layers in ((equation, True), (value, False)):  # nothing is known of a forward pass of others
        layer = KANLinear(2, 2, dtype=torch.float64)
        check(nn.Sequential(layer, KAN([2, 3, 2], dtype=torch.float64), layer), residual, by_layers=by_layers)
    model = KAN([2, 2, 2], dtype=torch.float64)
    model.layers[1].spline_weight = model.layers[0].spline_weight
    check(model, several)


def test_points_on_the_knots():
    """Where the second derivatives of quadratic splines jump, J is that of the residuals, which are linear in them."""
    x = torch.tensor([[-1.0, -1], [1, 1], [-0.6, 0.2], [0.2, -0.2], [1.4, 0.1]], dtype=torch.float64)
    for rows in (x, x.repeat(20, 1)):
        model = KAN([2, 1], dtype=torch.float64, spline_order=2)
        squares = problem(model, [(lambda model, x: jet(model, x, collapse=True)[2], rows)])
        by_jacobian = squares.jacobian(*next(squares.chunks())) @ squares.start
        torch.testing.assert_close(by_jacobian, squares.residuals(squares.start))


# What is not by layers


def test_hooks_and_replaced_forwards_of_a_layer():
    """A forward pass runs them, and so does its Jacobian."""
    hooked, replaced = network(), adapt(network())
    hooked.layers[1].register_forward_hook(lambda *arguments: 2 * arguments[-1])
    layer = replaced.get_base_model().layers[1]
    layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    for model in (hooked, replaced):
        check(model, value, by_layers=False)


def test_many_values_in_a_row():
    check(KAN([2, 3, MOST_COLUMNS + 1], dtype=torch.float64), value, by_layers=False)


class Around(nn.Module):
    """A network with parameters of its own around a KAN."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = network()
        self.speed = nn.Parameter(torch.tensor([0.7, 1.3], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.kan(x)


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def lora() -> nn.Module:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["spline_weight"], init_lora_weights=False)
    return get_peft_model(network(), config)


OTHERS = {
    "no KAN": (plain_network, value),
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


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    build, residual = OTHERS[name]
    check(build(), residual, by_layers=False)
