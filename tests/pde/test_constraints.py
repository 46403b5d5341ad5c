# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from helpers import adapt, refuses
from jet_helpers import assert_same, nested, network, points
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_lotra.kan import hessian, jet, laplacian
from peft_lotra.pde import BoxDistance, HardConstraint
from peft_lotra.pde.features import BoxFeatures


BOX = (-1.0, 0.0), (1.0, 2.0)


def walls(x: Tensor) -> Tensor:
    return x[..., 1:] * (1 - x[..., :1] ** 2)


def start(x: Tensor) -> Tensor:
    return -torch.sin(math.pi * x[..., :1]) * torch.exp(x[..., 1:])


def constrained(outputs: int = 1) -> HardConstraint:
    return HardConstraint(network(2, 5, outputs), walls, start)


def in_box(rows: int = 30) -> Tensor:
    low, high = torch.tensor(BOX, dtype=torch.float64)
    return torch.lerp(low, high, torch.rand(rows, 2, dtype=torch.float64))


def at_end(x: float) -> Tensor:
    """Return points (x, t) at several times."""
    t = torch.linspace(0, 2, 9, dtype=torch.float64)
    return torch.stack([torch.full_like(t, x), t], 1)


def adapted(model: nn.Module) -> nn.Module:
    return adapt(model, r=3)


def with_features() -> HardConstraint:
    features = BoxFeatures(*BOX, periodic=[0])
    return HardConstraint(nn.Sequential(features, network(3, 5, 1)), lambda x: x[..., 1:] ** 2, start)


def with_lora() -> nn.Module:
    config = LoraConfig(r=2, target_parameters=["kan.layers.0.spline_weight"], init_lora_weights=False)
    return get_peft_model(constrained(), config)


MODELS = {
    "dense": constrained,
    "several outputs": lambda: constrained(3),
    "constants": lambda: HardConstraint(network(2, 5, 1), 2.0, 1.0),
    "default lift": lambda: HardConstraint(network(2, 5, 1), walls),
    "a network as lift": lambda: HardConstraint(network(2, 5, 1), walls, network(2, 4, 1)),
    "nested": lambda: HardConstraint(constrained(), lambda x: x[..., 1:], constrained()),
    "features": with_features,
    "distance of a box": lambda: HardConstraint(network(2, 5, 1), BoxDistance(*BOX).double()),
    "around an adapted model": lambda: HardConstraint(adapted(network(2, 5, 1)), walls, start),
    "inside an adapted model": lambda: adapted(constrained()),
    "LoRA": with_lora,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:`jet` knows no closed form")
def test_jets_equal_nested_derivatives(name):
    model, x = MODELS[name](), in_box()
    directions = torch.randn(3, 2, dtype=torch.float64)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    expected = nested(model, x)
    u, du, d2u = nested(model, x, directions)

    assert_same(jet(model, x), expected)
    assert_same([laplacian(model, x)], [expected[2].sum(0)])
    assert_same(jet(model, x, directions), (u, du, d2u))
    assert_same(jet(model, x, directions, collapse=weights), (u, du, torch.tensordot(weights, d2u, 1)))


@pytest.mark.parametrize("name", MODELS)
def test_mixed_derivatives_equal_those_by_autograd(name):
    model, x = MODELS[name](), in_box(3)

    mixed = hessian(model, x)[2]

    expected = [torch.autograd.functional.hessian(lambda point: model(point[None])[0, 0], point) for point in x]
    torch.testing.assert_close(mixed[..., 0].permute(2, 0, 1), torch.stack(expected))


@pytest.mark.parametrize("end", [-1.0, 1.0])
def test_values_are_exact_where_the_distance_is_zero(end):
    model, x = adapted(constrained()), at_end(end)

    assert torch.equal(model(x), start(x))


def test_a_lift_and_a_double_zero_prescribe_value_and_velocity():
    """u = f + t g + t^2 n has the value f and the velocity g at t = 0."""

    def lift(x: Tensor) -> Tensor:
        return torch.cos(x[..., :1]) + x[..., 1:] * torch.sin(x[..., :1])

    distance = BoxDistance(*BOX, sides=[(1, "low")], twice=[(1, "low")]).double()
    x = torch.stack([torch.linspace(-1, 1, 9, dtype=torch.float64), torch.zeros(9)], 1)

    u, (_, velocity), _ = jet(HardConstraint(network(2, 5, 1), distance, lift), x)

    torch.testing.assert_close(u, torch.cos(x[:, :1]))
    torch.testing.assert_close(velocity, torch.sin(x[:, :1]))


@pytest.mark.parametrize("evaluate", [lambda model, x: model(x), jet])
@pytest.mark.parametrize("name", ["distance", "lift"])
def test_a_distance_or_a_lift_without_columns_is_refused(name, evaluate):
    """A shape (n,) would broadcast to (n, n)."""
    conditions = {"distance": walls, "lift": start} | {name: lambda x: x[:, 0]}
    model = HardConstraint(network(2, 5, 1), **conditions)

    with pytest.raises(ValueError, match=rf"`{name}` returns \(4,\) where the network returns \(4, 1\)"):
        evaluate(model, in_box(4))


WRONG = {
    "`kan` must be a network": lambda: HardConstraint(walls, walls),
    "`distance` is 'x'": lambda: HardConstraint(network(), "x"),
    "`distance` is None": lambda: HardConstraint(network(), None),
    "`lift` is nan": lambda: HardConstraint(network(), walls, math.nan),
    r"`lift` is \(1.0, 2.0\), .* or a function of x": lambda: HardConstraint(network(), walls, (1.0, 2.0)),
    r"`sides` has \(2, 'low'\)": lambda: BoxDistance(*BOX, sides=[(2, "low")]),
    r"`twice` has \(1, 'high'\)": lambda: BoxDistance(*BOX, sides=[(1, "low")], twice=[(1, "high")]),
    "the box has 2 coordinates": lambda: BoxDistance(*BOX)(torch.rand(3, 3)),
}


test_wrong_arguments_are_named = refuses(WRONG)


OUTSIDE = {
    "values": lambda model, x: model(x),
    "a jet": jet,
    "a jet with an adapter": lambda model, x: jet(adapted(model), x),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_points_outside_of_the_box_are_named(name):
    model, x = HardConstraint(network(2, 5, 1), BoxDistance(*BOX).double()), in_box()
    x[3, 1] = 2.5

    with pytest.raises(ValueError, match="coordinate 1 is 2.5 in row \\[3\\], but the box has 0 to 2"):
        OUTSIDE[name](model, x)


def test_the_distance_of_a_box_has_the_formula():
    x = points(20, 2)
    distance = BoxDistance((-2, -1.5), (2, 2.5), sides=[(0, "low"), (0, "high"), (1, "high")], twice=[(1, "high")])

    s, t = (x[:, 0] + 2) / 4, (2.5 - x[:, 1]) / 4
    torch.testing.assert_close(distance.double()(x)[:, 0], 4 * s * (1 - s) * t**2)
