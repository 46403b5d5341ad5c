# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of no registered kind: which are taken for KAN layers, with which layout, and which are not."""

from __future__ import annotations

from functools import partial, reduce

import orders
import pytest
import torch
from helpers import relative
from orders import Flat, Layer
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, check_kan_layer, find_kan_layers, register_kan_layer
from peft_lotra.layers import registry
from peft_lotra.layers.registry import get_kan_spec


def powers(x, count):
    return torch.stack([torch.tanh(x) ** k for k in range(count)], dim=-1)


class Polynomials(Layer):
    def __init__(self, i, o, **kwargs):
        super().__init__(i, o, 4, **{"order": "i o k", "before": torch.tanh, **kwargs})


class Wavelets(orders.Wavelets):
    """Not linear in scale and translation; `dead` is no part of the sum."""

    def __init__(self, i, o):
        super().__init__(i, o, norm=False)
        self.dead = nn.Parameter(torch.randn(o, i))


class ScaledTwice(nn.Module):
    """A factor of each edge in both branches: a ninth of the layer each."""

    def __init__(self, i, o):
        super().__init__()
        self.w, self.s = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.rand(o, i) + 0.5)
        self.c, self.t = nn.Parameter(torch.randn(o, i, 8)), nn.Parameter(torch.rand(o, i) + 0.5)

    def forward(self, x):
        y = torch.einsum("bik,oik->bo", powers(x, 8), self.c * self.t[..., None])
        return y + torch.tanh(2 * x) @ (self.w * self.s).T


class Places(nn.Module):
    """Trained places and widths of the functions of each input, which the outputs share."""

    def __init__(self, i, count=4, turned=False):
        super().__init__()
        self.places = nn.Parameter(torch.randn((count, i) if turned else (i, count)))
        self.widths, self.turned = nn.Parameter(torch.rand(i) + 0.5), turned

    def functions(self, x):
        places = self.places.T if self.turned else self.places
        return torch.exp(-(((x[..., None] - places) * self.widths[:, None]) ** 2))


class RadialInside(Places):
    def __init__(self, i, o, count=4, turned=False):
        super().__init__(i, count, turned)
        self.table = nn.Parameter(torch.randn(o, i * count))

    def forward(self, x):
        return self.functions(x).flatten(1) @ self.table.T


class RadialPart(nn.Module):
    def __init__(self, i, o, count=4):
        super().__init__()
        self.of, self.sum = Places(i, count), nn.Linear(i * count, o)

    def forward(self, x):
        return self.sum(self.of.functions(x).flatten(1))


class SmallNetworks(nn.Module):
    """A network of one hidden layer for each edge, some axes of which have the length one."""

    def __init__(self, i, o, hidden=3, waves=2):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(i, o, hidden, waves)), nn.Parameter(torch.randn(i, o, 1, hidden))
        self.b1 = nn.Parameter(torch.randn(i, o, hidden))

    def forward(self, x):
        waves = torch.stack([x, torch.sin(2 * x)], dim=-1)
        hidden = torch.tanh(torch.einsum("biw,iohw->bioh", waves, self.w1) + self.b1)
        return torch.einsum("bioh,iolh->bo", hidden, self.w2)


class ByEdge(nn.Module):
    """Coefficients of shape (in * out, basis), and a branch beside them."""

    def __init__(self, i, o, order="io"):
        super().__init__()
        self.sizes, self.order = {"i": i, "o": o}, order
        self.table, self.base = nn.Parameter(torch.randn(i * o, 4)), nn.Sequential(nn.SiLU(), nn.Linear(i, o))

    def forward(self, x):
        table = self.table.unflatten(0, [self.sizes[axis] for axis in self.order])
        return torch.einsum(f"bik,{self.order}k->bo", powers(x, 4), table) + self.base(x)


class ByFunction(nn.Module):
    """A linear layer, or matrix, for each function."""

    def __init__(self, i, o, make=lambda i, o: nn.Linear(i, o, bias=False)):
        super().__init__()
        made = [make(i, o) for _ in range(4)]
        self.sums = (nn.ModuleList if isinstance(made[0], nn.Module) else nn.ParameterList)(made)

    def forward(self, x):
        weights = [getattr(part, "weight", part) for part in self.sums]
        return sum(torch.tanh(x) ** k @ weight.T for k, weight in enumerate(weights))


class Radial(RadialPart):
    """FastKAN under other names: fixed places, and a branch that is a `Sequential`."""

    def __init__(self, i, o):
        super().__init__(i, o)
        self.of.requires_grad_(False)
        self.norm, self.branch = nn.LayerNorm(i), nn.Sequential(nn.SiLU(), nn.Linear(i, o))

    def forward(self, x):
        return super().forward(self.norm(x)) + self.branch(x)


@pytest.mark.parametrize("sizes", [(3, 5), (4, 4)])
@pytest.mark.parametrize(
    ("make", "residual"),
    [
        (ByEdge, "base.1.weight"),
        (partial(ByEdge, order="oi"), "base.1.weight"),
        (ByFunction, None),
        (partial(ByFunction, make=lambda i, o: torch.randn(o, i)), None),
        (Radial, "branch.1.weight"),
    ],
)
def test_lists_edges_and_branches(make, residual, sizes):
    i, o = sizes
    layer, x = make(i, o), torch.rand(7, i)
    spec = get_kan_spec(layer)
    tensor = spec.locate(layer)
    assert tensor.shape == (o, i, 4) and spec.residual == (residual and (residual, "o i"))
    before, delta = layer(x), torch.zeros(tensor.read(layer).shape)
    delta[1, 2, :4] = 1
    with torch.no_grad():
        for name, part in tensor.split(delta).items():
            layer.get_parameter(name).add_(part)
    moved = (layer(x) - before).abs().amax(0)
    assert moved[1] > 1e-3 and moved.sum() == moved[1]


class Tokens(Polynomials):
    """Takes (batch, tokens, features) alone."""

    def forward(self, x):
        batch, tokens, _ = x.shape
        return super().forward(x.reshape(batch * tokens, -1)).view(batch, tokens, -1)


def test_a_layer_of_tokens_and_one_of_four_axes_of_any_length():
    for inputs in (2, 5):
        tensor = get_kan_spec(layer := Tokens(inputs, 4, residual="oi")).locate(layer)
        assert tensor.shape == (4, inputs, 4) and tensor.has_residual
    for outputs in (1, 4):
        tensor = get_kan_spec(layer := SmallNetworks(5, outputs)).locate(layer)
        assert set(tensor.names) == {"w1", "w2", "b1"} and tensor.shape == (outputs, 5, 3 * 2 + 3 + 3)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 5), (5, 1)])
@pytest.mark.parametrize("residual", [None, "oi", "io"])
@pytest.mark.parametrize("order", ["oik", "iok", "iko", "kio", "oki", "koi"])
def test_any_order_of_axes(order, residual, sizes):
    layer = Polynomials(*sizes, order=order, residual=residual)
    tensor = get_kan_spec(layer).locate(layer)
    assert tensor.shape == (sizes[1], sizes[0], 4) and tensor.has_residual == (residual is not None)
    expected = layer.A.permute([order.index(axis) for axis in "oik"])
    assert torch.equal(tensor.read(layer)[..., :4], expected)
    if residual and 1 not in sizes:
        assert torch.equal(tensor.read(layer)[..., -1], layer.base if residual == "oi" else layer.base.T)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("inner", ["ik", "ki"])
def test_a_flattened_axis(inner, first):
    layer = Flat(4, 6, inner=inner, first=first)
    tensor = get_kan_spec(layer).locate(layer)
    table = layer.table if first else layer.table.T
    expected = table.unflatten(1, (4, 4))
    assert torch.equal(tensor.read(layer), expected if inner == "ik" else expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("make", "coefficients", "residual"),
    [(Wavelets, "scale translation A", None), (ScaledTwice, "c s t", "w")],
)
def test_parts_and_factors_of_edges_that_are_a_large_share(make, coefficients, residual):
    layer = make(5, 4)
    spec = get_kan_spec(layer)
    tensor = spec.locate(layer)
    assert tensor.names == tuple(coefficients.split()) and check_kan_layer(layer).linear == "no"
    assert spec.residual == (residual and (residual, "o i"))


@pytest.mark.parametrize(
    "make, places, pattern",
    [
        (RadialInside, "places", "i z"),
        (lambda i, o: RadialInside(i, o, turned=True), "places", "z i"),
        (RadialPart, "of.places", "i z"),
    ],
)
def test_places_of_functions_are_a_part_where_they_are_a_large_share(make, places, pattern):
    for outputs in (1, 3):
        spec = get_kan_spec(layer := make(5, outputs))
        assert spec.parts[1:] == ((places, pattern),)
        assert spec.locate(layer).shape == (outputs, 5, 4 + 4)
    spec = get_kan_spec(layer := make(5, 20))
    assert len(spec.parts) == 1 and spec.locate(layer).shape == (20, 5, 4)


def test_a_part_that_is_a_network_of_its_own_is_not_looked_into():
    class Deep(RadialPart):
        def __init__(self):
            super().__init__(5, 3)
            self.of = nn.Sequential(Places(5))  # a layer of torch, or one with parts
            self.of.functions = self.of[0].functions

    class Large(RadialPart):
        def __init__(self):
            super().__init__(5, 3)
            self.of.more = nn.Parameter(torch.randn(100, 100))

    for layer in (Deep(), Large()):
        assert get_kan_spec(layer) is None


def test_a_file_of_another_version_that_left_parameters_out(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(ScaledTwice(5, 4))

    x = torch.rand(8, 5)
    described = {"coefficients": ("c", "o i k"), "residual": ("w", "o i")}
    register_kan_layer("generic", matches=ScaledTwice, **described)
    model = get_peft_model(build(), LoTRAConfig(r=2, init_weights=False))
    y = model(x)
    model.save_pretrained(tmp_path)
    del registry.REGISTERED["generic"]
    assert relative(PeftModel.from_pretrained(build(), tmp_path)(x), y) < 1e-6
    assert len(get_kan_spec(build()[0]).parts) == 3


class Formula(nn.Module):
    """A module of parameters of some shapes that computes a function of itself and x."""

    def __init__(self, function, shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def gates(m, x, top=4):
    gates = (x @ m.gate.T).softmax(-1)
    return gates * (gates >= gates.topk(top).values[:, -1:])


class Lists(nn.Module):
    """Linear layers in a list: experts of a gate, a network, or sums that are no more than one linear layer."""

    def __init__(self, how):
        super().__init__()
        self.how, self.parts = how, nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x):
        if self.how == "network":
            return reduce(lambda x, part: torch.relu(part(x)), self.parts, x)
        values = torch.stack([part(x) for part in self.parts], -1)
        return (values * x.softmax(-1)[:, None]).sum(-1) if self.how == "experts" else values.sum(-1)


def heads(m, x):
    return (torch.einsum("nd,hde->hne", x, w) for w in (m.q, m.k, m.v))


def attention(m, x):
    q, k, v = heads(m, x)
    return ((q @ k.mT).softmax(-1) @ v).mean(0)


def product_of_heads(m, x):
    q, k, v = heads(m, x)
    return (q * k.sigmoid() * v).sum(0)


EXPERTS = {"w": (4, 6, 6), "gate": (4, 6)}
HEADS = dict.fromkeys("qkv", (3, 6, 6))
TWO = {"a": (6, 6), "b": (6, 6)}
FORMULAS = {
    "experts": (lambda m, x: torch.einsum("bi,eio,be->bo", x, m.w, gates(m, x)), EXPERTS),
    "one expert": (lambda m, x: torch.einsum("bi,eio,be->bo", x, m.w, gates(m, x, 1)), EXPERTS),
    "two experts": (lambda m, x: torch.einsum("bi,eio,be->bo", x, m.w, gates(m, x, 2)), EXPERTS),
    "ensemble": (lambda m, x: torch.einsum("bi,eio->bo", x, m.w), EXPERTS),
    "bilinear": (lambda m, x: torch.einsum("bi,oij,bj->bo", x, m.w, x), {"w": (6, 6, 6)}),
    "positions": (lambda m, x: x + m.w, {"w": (1, 4, 6)}),
    "attention": (attention, HEADS),
    "product of heads": (product_of_heads, HEADS),
    "gated": (lambda m, x: (x @ m.a.T) * torch.sigmoid(x @ m.b.T), TWO),
    "sum of matrices": (lambda m, x: x @ (m.a + m.b), TWO),
    "maxout": (lambda m, x: torch.einsum("bi,oik->bok", x, m.w).amax(-1), {"w": (5, 6, 3)}),
    "convolution": (lambda m, x: nn.functional.conv1d(x, m.w, padding=1), {"w": (6, 6, 3)}),
    "low rank": (lambda m, x: x @ m.a.T @ m.b.T, {"a": (2, 6), "b": (6, 2)}),
    "perceptron": (lambda m, x: nn.functional.gelu(x @ m.a.T) @ m.b.T, {"a": (24, 6), "b": (6, 24)}),
    "wide perceptron": (lambda m, x: nn.functional.gelu(x @ m.a.T) @ m.b.T, {"a": (24, 6), "b": (48, 24)}),
}
OTHERS = [
    *(lambda name=name: type(name, (Formula,), {})(*FORMULAS[name]) for name in FORMULAS),
    *(lambda: nn.Conv1d(4, 4, 3), lambda: nn.MultiheadAttention(4, 2), lambda: nn.Bilinear(4, 4, 4)),
    *(lambda how=how: Lists(how) for how in ("experts", "network", "sum")),
    *(lambda: nn.LSTM(4, 4), lambda: nn.TransformerEncoderLayer(8, 2), lambda: nn.GRUCell(4, 4)),
    lambda: type("ScaledConv", (nn.Conv1d,), {"forward": lambda m, x: nn.functional.conv1d(x, 2 * m.weight)})(6, 6, 3),
]


@pytest.mark.parametrize("make", OTHERS)
def test_no_kan_layers(make):
    module = make()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert find_kan_layers(nn.Sequential(module)) == []
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_layer_of_several_arguments_and_one_without_values_are_left_alone():
    class Graph(Polynomials):
        def forward(self, x, edges):
            return super().forward(x)

    class Fresh(Polynomials):
        pass

    assert get_kan_spec(Graph(5, 4)) is None and get_kan_spec(Fresh(5, 4).to("meta")) is None
    assert get_kan_spec(Fresh(5, 4)).family == "generic"  # it is not remembered as none
    assert get_kan_spec(Fresh(5, 4).to("meta")).family == "generic"


def test_formulas_of_pykan_are_no_layers():
    kan = pytest.importorskip("kan")
    model = kan.KAN(width=[2, 3, 1], grid=3, k=3, seed=0, auto_save=False)
    model.fix_symbolic(0, 0, 1, "sin", fit_params_bool=False, verbose=False, log_history=False)
    assert [layer.name for layer in find_kan_layers(model)] == ["act_fun.0", "act_fun.1"]


class SplineLinear(nn.Linear):
    """A KAN layer, of a registered family, that is derived from a linear layer."""

    def forward(self, x):
        return super().forward(torch.sin(torch.cat([x, 2 * x], dim=-1)))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(3)])
def test_a_model_of_registered_layers_is_no_layer(norm):
    register_kan_layer("spline-linear", matches=SplineLinear, coefficients=("weight", "o (k i)"), axes={"k": 2})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = SplineLinear(6, 3), norm

        def forward(self, x):
            return self.norm(self.lin(x))

    assert [(layer.name, layer.family) for layer in find_kan_layers(Model())] == [("lin", "spline-linear")]
