# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import adapt
from jet_helpers import assert_same, nested, network, points
from torch import Tensor, nn

from peft_lotra.derivatives import api as derivatives
from peft_lotra.kan import (
    KAN,
    KANConfig,
    KANLinear,
    KANModel,
    SlimKAN,
    hessian,
    jet,
    laplacian,
)


Parts = tuple[Tensor, Tensor, Tensor]


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("count", [None, 1, 4])
def test_agrees_with_nested_autograd(order, count):
    model, x = network(spline_order=order, grid_size=4), points()
    directions = None if count is None else torch.randn(count, 3, dtype=torch.float64)
    assert_same(jet(model, x, directions), nested(model, x, directions))


def test_any_leading_shape():
    model, x = network(), points(24)
    u, du, d2u = jet(model, x)
    u3, du3, d2u3 = jet(model, x.view(2, 12, 3))
    assert_same((u3.flatten(0, 1), du3.flatten(1, 2), d2u3.flatten(1, 2)), (u, du, d2u), 1e-14)
    assert_same(jet(model, x[0]), (u[0], du[:, 0], d2u[:, 0]), 1e-14)
    assert jet(model, x[:0])[2].shape == (3, 0, 2)


@pytest.mark.parametrize("rows", [3, 40, 3000])  # by plain operations, by hand, in blocks
def test_gradients_agree_with_nested_autograd(rows):
    model, x = network(2, 16, 16, 1), points(rows, 2)
    gradients = []
    for parts in (jet(model, x), nested(model, x)):
        loss = sum(part.square().mean() for part in parts)
        gradients.append(torch.autograd.grad(loss, model.parameters()))
    for a, e in zip(*gradients, strict=True):
        assert (a - e).abs().max() <= 1e-10 * e.abs().max()


def test_laplacian_and_weighted_sum():
    model, x = network(), points()
    second = nested(model, x)[2]
    torch.testing.assert_close(laplacian(model, x), second.sum(0), rtol=1e-10, atol=1e-10)
    u, du, weighted = jet(model, x, collapse=(1.0, 0.0, -0.5))
    torch.testing.assert_close(weighted, second[0] - second[2] / 2, rtol=1e-10, atol=1e-10)
    assert_same((u, du), jet(model, x)[:2], 1e-14)


@pytest.mark.parametrize("rows", [5, 200])
def test_weights_that_are_learned(rows):
    """As the coefficients of an equation that are to be found."""
    model, x = network(), points(rows)
    weights = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(jet(model, x, collapse=weights)[2].sum(), weights)
    torch.testing.assert_close(found, jet(model, x)[2].sum((1, 2)), rtol=1e-10, atol=1e-10)


def test_hessian_by_polarization():
    model, x = network(), points(5)
    u, du, d2u = hessian(model, x)
    expected = torch.stack([torch.func.hessian(model)(row) for row in x])  # (N, O, I, I)
    assert_same((u, du, d2u), (model(x), jet(model, x)[1], expected.permute(2, 3, 0, 1)))
    v, w = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(
        hessian(model, x, torch.stack([v, w]))[2][0, 1], torch.einsum("noij,i,j->no", expected, v, w)
    )


def test_float32():
    model, x = network().float(), points().float()
    for a, e in zip(jet(model, x), jet(copy.deepcopy(model).double(), x.double()), strict=True):
        assert a.dtype == torch.float32
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


# Models


@pytest.mark.parametrize(
    "wrap",
    [
        lambda kan: kan.layers[0],
        lambda kan: nn.Sequential(*kan.layers),
        lambda kan: nn.Sequential(kan, KANLinear(2, 2, dtype=torch.float64)),
        lambda kan: torch.compile(kan),  # not run: only looked through
    ],
)
def test_networks_around_layers(wrap):
    model, x = wrap(network()), points()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        parts = jet(model, x)
    assert_same(parts, nested(getattr(model, "_orig_mod", model), x))


def test_kan_model():
    model, x = KANModel(KANConfig(widths=[3, 5, 2])).double(), points()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(jet(model, x), nested(model, x))
        assert_same(jet(adapt(model), x), nested(model, x))


class WrittenOut(nn.Module):
    """Layer normalization by elementary operations: torch's own (2.13) has a wrong third derivative, which finite
    differences tell."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt() * self.norm.weight + self.norm.bias


def written_out(model: KAN) -> nn.Module:
    return nn.Sequential(*(WrittenOut(part) if isinstance(part, nn.LayerNorm) else part for part in model.layers))


@pytest.mark.parametrize("rows", [2, 40, 3000])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_slim(rows, norm):
    model, x = SlimKAN((3, 7, 6, 2), (4, 3, 3), norm=norm, dtype=torch.float64), points(rows)
    parts, expected = jet(model, x), nested(written_out(model), x)
    assert_same(parts, expected)
    torch.testing.assert_close(laplacian(model, x), expected[2].sum(0), rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(sum(part.square().mean() for part in some), model.parameters())
        for some in (parts, expected)
    ]
    for a, e in zip(*gradients, strict=True):
        assert (a - e).abs().max() <= 1e-10 * e.abs().max()


@pytest.mark.filterwarnings("ignore:Ranks are larger")
def test_slim_kan_model_and_a_dense_layer_among_slim_ones():
    config = KANConfig(widths=[3, 5, 4, 2], ranks=[(3, 3, 4), None, (2, 3, 4)])
    model, x = KANModel(config).double(), points()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(jet(model, x), nested(model, x))
        warnings.filterwarnings("ignore", "Adapters have more parameters")
        assert_same(jet(adapt(model), x), nested(model, x))


@pytest.mark.parametrize("collapse", [False, (1.0, 0.0, -2.0)])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_normalized(norm, collapse):
    model, x = network(norm=norm), points()
    model(torch.randn(100, 3, dtype=torch.float64))  # moves the running statistics
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        parts = jet(model, x, collapse=collapse)
    u, du, d2u = nested(model, x)
    assert_same(parts, (u, du, torch.tensordot(torch.tensor(collapse).to(d2u), d2u, 1) if collapse else d2u))
    adapted = adapt(model)
    assert_same(jet(adapted, x), nested(adapted, x))
    first = nn.Sequential(nn.LayerNorm(3, elementwise_affine=False, dtype=torch.float64), network())
    assert_same(jet(first, x), nested(first, x))
    with pytest.raises(ValueError, match="last dimension must be 3"):
        jet(first, points(40, 2))


def test_rows_that_depend_on_each_other_are_refused():
    with pytest.raises(ValueError, match=r"`layers.1` is a BatchNorm .*model.eval\(\)"):
        jet(network(norm="batch").train(), points())


# Transforms


def test_compiles_in_one_graph():
    model, x = adapt(network()), points()

    def loss(x: Tensor) -> Tensor:
        return sum(part.square().mean() for part in jet(model, x))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(compiled(x), loss(x))
    for a, e in zip(
        torch.autograd.grad(compiled(x), parameters), torch.autograd.grad(loss(x), parameters), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_rows_by_vmap():
    model, x = adapt(network()), points(300)
    u, du, d2u = torch.func.vmap(lambda row: jet(model, row), out_dims=(0, 1, 1))(x)
    assert_same((u, du, d2u), jet(model, x), 1e-12)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(lambda p: jet(model, p)[0]))(x), du.permute(1, 2, 0))


# Other networks


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kan = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.kan(x) * (1 - x[..., :1] ** 2)


def test_other_networks_are_differentiated_by_transforms(monkeypatch):
    monkeypatch.setattr(derivatives, "_warned", set())
    model, x = Shifted(), points(6) * 0.8
    with pytest.warns(UserWarning, match="knows no closed form") as seen:
        parts = jet(model, x)
        jet(model, x)
    assert sum("closed form" in str(warning.message) for warning in seen) == 1
    assert_same(parts, nested(model, x))
    assert_same(jet(model, x, collapse=True)[2:], (nested(model, x)[2].sum(0),))
    assert_same(jet(adapt(model), x), nested(model, x))


def test_hooks_are_not_passed_over(monkeypatch):
    monkeypatch.setattr(derivatives, "_warned", set())
    model, x = network(), points()
    model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.warns(UserWarning, match="knows no closed form"):
        assert_same(jet(model, x), nested(model, x))


# Errors


@pytest.mark.parametrize("shape", [(3,), (2, 2), (0, 3), (1, 2, 3)])
def test_directions_of_a_wrong_shape(shape):
    for function in (jet, hessian):
        with pytest.raises(ValueError, match=r"`directions` has shape .*must be \(D, 3\)"):
            function(network(), points(), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "given", "error", "message"),
    [
        (points(40, 2), {}, ValueError, r"`x` has shape \(40, 2\), but its last dimension must be 3"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, TypeError, "torch.int64"),
        ("x", {}, TypeError, "`x` must be a floating point tensor"),
        (points(), {"collapse": (1.0, 0.0)}, ValueError, "has 2 weights, but there are 3 directions"),
        (points(), {"collapse": None}, TypeError, "`collapse` must be a bool or a weight of each direction"),
        (points(), {"collapse": ["a", "b", "c"]}, TypeError, "`collapse` must be a bool or a weight"),
        (points(), {"directions": [[1.0, 0.0, 0.0]]}, TypeError, "`directions` must be a tensor or None"),
    ],
)
def test_wrong_arguments(x, given, error, message):
    with pytest.raises(error, match=message):
        jet(network(), x, **given)
