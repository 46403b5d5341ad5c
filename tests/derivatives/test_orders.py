# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of the orders 1, 3 and 4, beside nested autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from foreign import Hard, make_foreign
from helpers import adapt
from jet_helpers import assert_same, nested, network, points
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra.derivatives import api
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.derivatives.torch_fallback import ExactNorms
from peft_lotra.kan import KAN, KnotMap, SlimKAN, jet, laplacian
from peft_lotra.optim.row_gradients import row_gradients
from peft_lotra.pde import BoxFeatures, HardConstraint


pytestmark = pytest.mark.filterwarnings("ignore:Adapters have more", "ignore:Splines of degree", "ignore:Ranks are")


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(2 * x)


def chain(kind: str) -> nn.Module:
    return nn.Sequential(FAMILIES[kind](3, 4), FAMILIES[kind](4, 2)).double()


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 2)).double()


def with_knots() -> nn.Module:
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(3, 1).T
    return nn.Sequential(KnotMap(*ends, torch.rand(3, 7) + 0.5), network(3, 4, 2, spline_order=5))


def constrained() -> nn.Module:
    kan = nn.Sequential(BoxFeatures([-2] * 3, [2] * 3, periodic=[0], neumann=[1]), network(4, 5, 2)).double()
    return HardConstraint(kan, lambda x: x[..., :1] * torch.exp(x[..., 1:2]), lambda x: torch.sin(x[..., :1]))


ACTIVATIONS = [nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(2.0, 1.0), nn.GELU(), Sine()]
KINDS = ["efficient-kan", "fast-kan", "faster-kan", "cheby-kan", "fourier-kan", "pina"]
ADAPTED = {
    "splines of degree 5": lambda: network(spline_order=5),
    "slim": lambda: SlimKAN((3, 7, 6, 2), (4, 3, 3), spline_order=5, dtype=torch.float64),
    "layer normalization": lambda: network(norm="layer"),
    "tanh between": lambda: network(norm="tanh"),
    "knots": with_knots,
    **{kind: lambda kind=kind: chain(kind) for kind in KINDS},
}
MODELS = {
    **ADAPTED,
    **{repr(activation): lambda activation=activation: mlp(activation) for activation in ACTIVATIONS},
    **{f"{name}, adapted": lambda name=name: adapt(ADAPTED[name]()) for name in ADAPTED},
}
OTHERS = {
    "constrained": constrained,
    "constrained, adapted": lambda: adapt(constrained()),
    "pykan": lambda: nn.Sequential(nn.Linear(3, 2), make_foreign("pykan")).double(),
    "own module": lambda: Hard(network()),
    "own module of three outputs, adapted": lambda: adapt(Hard(network(3, 4, 3))),
}
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:`jet` knows no closed form")
@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_agrees_with_nested_autograd(name):
    torch.manual_seed(0)
    model, x = {**MODELS, **OTHERS}[name](), points(30) * 0.8
    assert name in OTHERS or stages_of(model)
    with ExactNorms():
        expected = nested(model, x, order=4)
    for order in (1, 3, 4):
        assert_same(jet(model, x, order=order), expected[: order + 1])
        if order > 1:
            collapsed = torch.tensordot(WEIGHTS, expected[order], 1)
            assert_same(jet(model, x, order=order, collapse=WEIGHTS), (*expected[:order], collapsed))


@pytest.mark.parametrize("rows", [4, 100, 3000])  # by plain operations, by hand, in blocks
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("order", [1, 3, 4])
def test_gradients(order, outputs, rows):
    """Of each derivative alone, so that others have none."""
    model, x = network(3, 5, outputs, spline_order=5), points(rows)
    found, expected = list(jet(model, x, order=order)), list(nested(model, x, order=order))
    if order > 1:
        found.append(jet(model, x, order=order, collapse=WEIGHTS)[-1])
        expected.append(torch.tensordot(WEIGHTS, expected[-1], 1))
    for parts in zip(found, expected, strict=True):
        gradients = [torch.autograd.grad(part.square().sum(), model.parameters(), retain_graph=True) for part in parts]
        for a, e in zip(*gradients, strict=True):
            assert (a - e).abs().max() <= 1e-10 * e.abs().max()


def test_gradients_of_gradients():
    model, x = network(3, 5, 4, spline_order=5), points(100)

    def twice(parts) -> Tensor:
        (once, *_) = torch.autograd.grad(
            sum(part.square().sum() for part in parts), [*model.parameters()], create_graph=True
        )
        return torch.autograd.grad(once.square().sum(), [*model.parameters()][-1])[0]

    torch.testing.assert_close(twice(jet(model, x, order=3)), twice(nested(model, x, order=3)), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`jet` knows no closed form")
@pytest.mark.parametrize("name", ["splines of degree 5", "GELU(approximate='none')", "slim, adapted", "own module"])
def test_rows_by_vmap_and_leading_dimensions(name):
    model, x = {**MODELS, **OTHERS}[name](), points(6)
    expected = jet(model, x, order=4)
    found = torch.func.vmap(lambda row: jet(model, row[None], order=4), out_dims=(0, 1, 1, 1, 1))(x)
    assert_same([part.squeeze(-2) for part in found], expected)
    assert_same([part.flatten(-3, -2) for part in jet(model, x.view(2, 3, 3), order=4)], expected)


def test_compiles():
    model, x = nn.Sequential(adapt(network(3, 2)), nn.LayerNorm(2), nn.Tanh()).double(), points()
    compiled = torch.compile(lambda x: jet(model, x[:, :1] * x, order=3), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), jet(model, x[:, :1] * x, order=3))


@pytest.mark.parametrize("order", [1, 3, 4])
@pytest.mark.parametrize("name", ["splines of degree 5", "Tanh()", "slim"])
def test_gradients_of_rows(name, order):
    """Those of Levenberg-Marquardt."""
    model, x = MODELS[name](), points(80)
    parameters = list(model.parameters())

    def residuals() -> Tensor:
        return sum(
            (0.1**n * part.square()).sum((0, -1))[:, None] for n, part in enumerate(jet(model, x, order=order)[1:])
        )

    found = row_gradients(residuals, parameters, len(x))
    for row, gradient in zip(residuals()[:3], found, strict=False):
        expected = torch.autograd.grad(row.sum(), parameters, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]), rtol=1e-9, atol=1e-9)


def test_the_biharmonic_operator():
    model, x = network(2, 5, 1, spline_order=5), points(40, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    found = jet(model, x, directions, order=4, collapse=(2 / 3, 2 / 3, 1 / 6, 1 / 6))[-1]
    expected = torch.func.vmap(torch.func.hessian(torch.func.hessian(lambda p: model(p)[0])))(x)
    torch.testing.assert_close(found[:, 0], torch.einsum("niijj->n", expected), rtol=1e-9, atol=1e-9)


def test_derivatives_that_splines_do_not_have(monkeypatch):
    monkeypatch.setattr(api, "_warned", set())
    model, x = network(), points()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jet(model, x, order=3)
    with pytest.warns(UserWarning, match="degree 3 have no derivative of order 4.* `spline_order=5`") as seen:
        for _ in range(2):
            jet(model, x, order=4)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="degree 1 have no derivative of order 2"):
        laplacian(Hard(KAN([3, 2], spline_order=1).double()), x)


@pytest.mark.parametrize("order", [0, 5, "3", 2.0, True, None, (3, 1)])
def test_wrong_orders(order):
    with pytest.raises(ValueError, match=r"`order` is .*, but must be"):
        jet(network(), points(), order=order)


def test_a_sum_of_slopes_is_refused():
    with pytest.raises(ValueError, match="`collapse` is for order 2 and higher"):
        jet(network(), points(), order=1, collapse=True)
