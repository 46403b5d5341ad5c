# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from helpers import adapt
from jet_helpers import assert_same, nested, network, points
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lotra.kan import hessian, jet, laplacian
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import BoxDistance, BoxFeatures, HardConstraint


BOX = (-1.0, 0.0), (1.0, 2.0)


def walls(x: Tensor) -> Tensor:
    return x[..., 1:] * (1 - x[..., :1] ** 2)


def start(x: Tensor) -> Tensor:
    return -torch.sin(math.pi * x[..., :1]) * torch.exp(x[..., 1:])


def constrained(outputs: int = 1) -> HardConstraint:
    return HardConstraint(network(2, 5, outputs), walls, start)


def in_box(rows: int = 30) -> Tensor:
    return torch.rand(rows, 2, dtype=torch.float64) * torch.tensor([2.0, 2.0]) + torch.tensor([-1.0, 0.0])


def adapted(model: nn.Module) -> nn.Module:
    return adapt(model, r=3)


MODELS = {
    "dense": constrained,
    "several outputs": lambda: constrained(3),
    "constants": lambda: HardConstraint(network(2, 5, 1), 2.0, 1.0),
    "default lift": lambda: HardConstraint(network(2, 5, 1), walls),
    "a network as lift": lambda: HardConstraint(network(2, 5, 1), walls, network(2, 4, 1)),
    "nested": lambda: HardConstraint(constrained(), lambda x: x[..., 1:], constrained()),
    "features": lambda: HardConstraint(
        nn.Sequential(BoxFeatures(*BOX, periodic=[0], neumann=[1]), network(3, 5, 1)), lambda x: x[..., 1:] ** 2, start
    ),
    "distance of a box": lambda: HardConstraint(network(2, 5, 1), BoxDistance(*BOX).double()),
    "around an adapted model": lambda: HardConstraint(adapted(network(2, 5, 1)), walls, start),
    "inside an adapted model": lambda: adapted(constrained()),
    "LoRA": lambda: get_peft_model(
        constrained(), LoraConfig(r=2, target_parameters=["kan.layers.0.spline_weight"], init_lora_weights=False)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:`jet` knows no closed form")
def test_jets_equal_nested_derivatives(name):
    model, x = MODELS[name](), in_box()
    assert_same(jet(model, x), nested(model, x))
    directions = torch.randn(3, 2, dtype=torch.float64)
    assert_same(jet(model, x, directions), nested(model, x, directions))
    u, du, d2u = nested(model, x, directions)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    assert_same(jet(model, x, directions, collapse=weights), (u, du, torch.tensordot(weights, d2u, 1)))
    torch.testing.assert_close(laplacian(model, x), nested(model, x)[2].sum(0))
    mixed = hessian(model, x)[2]
    expected = torch.stack([torch.autograd.functional.hessian(lambda p: model(p[None])[0, 0], row) for row in x[:3]])
    torch.testing.assert_close(mixed[..., :3, 0].permute(2, 0, 1), expected)


def test_values_are_exact_where_the_distance_is_zero():
    model = adapted(constrained())
    t = torch.linspace(0, 2, 7, dtype=torch.float64)
    for end in (-1.0, 1.0):
        x = torch.stack([torch.full_like(t, end), t], 1)
        assert torch.equal(model(x), start(x))


def test_initial_velocity():
    """u = f + t g + t^2 n has the value f and the velocity g at t = 0."""
    lift = lambda x: torch.cos(x[..., :1]) + x[..., 1:] * torch.sin(x[..., :1])  # noqa: E731
    distance = BoxDistance(*BOX, sides=[(1, "low")], twice=[(1, "low")]).double()
    x = torch.stack([torch.linspace(-1, 1, 9, dtype=torch.float64), torch.zeros(9)], 1)
    u, du, _ = jet(HardConstraint(network(2, 5, 1), distance, lift), x)
    torch.testing.assert_close(u, torch.cos(x[:, :1]))
    torch.testing.assert_close(du[1], torch.sin(x[:, :1]))


def test_neumann_values():
    """u_x = 1 at both ends of x, u = 0 at t = 0."""
    kan = nn.Sequential(BoxFeatures(*BOX, neumann=[0]), network(2, 5, 1))
    model = HardConstraint(kan, BoxDistance(*BOX, sides=[(1, "low")]).double(), lambda x: x[..., :1])
    t = torch.linspace(0, 2, 9, dtype=torch.float64)
    for end in (-1.0, 1.0):
        slope = jet(model, torch.stack([torch.full_like(t, end), t], 1))[1][0]
        torch.testing.assert_close(slope, torch.ones_like(slope))


def burgers(model: nn.Module, x: Tensor) -> Tensor:
    u, (u_x, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t + u * u_x - 0.3 * u_xx


@pytest.mark.parametrize("adapt_it", [False, True])
def test_levenberg_marquardt(adapt_it):
    model = adapted(constrained()) if adapt_it else constrained()
    history = LevenbergMarquardt(model).fit([(burgers, in_box(300))], 8, progress=False)
    assert history[-1].loss < 0.05 * history[0].loss


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model, x = adapted(constrained()), in_box()
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert isinstance(loaded.merge_and_unload(), HardConstraint)


@pytest.mark.parametrize("part", ["distance", "lift"])
def test_wrong_shapes(part):
    """(n,) would broadcast to (n, n)."""
    given = {"distance": walls, "lift": start} | {part: lambda x: x[:, 0]}
    model, x = HardConstraint(network(2, 5, 1), **given), in_box(4)
    for evaluate in (model, lambda x: jet(model, x)):
        with pytest.raises(ValueError, match=rf"`{part}` returns \(4,\) where the network returns \(4, 1\)"):
            evaluate(x)


WRONG = {
    "`kan` must be a network": lambda: HardConstraint(walls, walls),
    "`distance` is 'x'": lambda: HardConstraint(network(), "x"),
    "`distance` is None": lambda: HardConstraint(network(), None),
    "`lift` is nan": lambda: HardConstraint(network(), walls, math.nan),
    r"`sides` has \(2, 'low'\)": lambda: BoxDistance(*BOX, sides=[(2, "low")]),
    r"`twice` has \(1, 'high'\)": lambda: BoxDistance(*BOX, sides=[(1, "low")], twice=[(1, "high")]),
    "the box has 2 coordinates": lambda: BoxDistance(*BOX)(torch.rand(3, 3)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


def test_points_outside_of_the_box():
    model, x = HardConstraint(network(2, 5, 1), BoxDistance(*BOX).double()), in_box()
    x[3, 1] = 2.5
    for evaluate in (model, lambda x: jet(model, x), lambda x: jet(adapted(model), x)):
        with pytest.raises(ValueError, match="coordinate 1 is 2.5 in row \\[3\\], but the box has 0 to 2"):
            evaluate(x)


def test_distance_of_a_box_against_the_formula():
    x = points(20, 2)
    distance = BoxDistance((-2, -1.5), (2, 2.5), sides=[(0, "low"), (0, "high"), (1, "high")], twice=[(1, "high")])
    s, t = (x[:, 0] + 2) / 4, (2.5 - x[:, 1]) / 4
    torch.testing.assert_close(distance.double()(x)[:, 0], 4 * s * (1 - s) * t**2)
