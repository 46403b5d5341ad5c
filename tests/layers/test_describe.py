# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of no registered kind: some are recognized as KAN layers, with their layout."""

from functools import partial, reduce
from itertools import product

import orders
import pytest
import torch
from helpers import assert_equal, state
from orders import Flat, Formula, KnotsAsParameter, Layer, Legendre, assert_one_edge
from torch import nn

from peft_lotra import find_kan_layers, register_kan_layer
from peft_lotra.layers.recognize import get_kan_spec, is_linear


def powers(x, count):
    return torch.stack([torch.tanh(x) ** k for k in range(count)], dim=-1)


class Polynomials(Layer):
    def __init__(self, i, o, **kwargs):
        super().__init__(i, o, 4, **{"order": "i o k", "before": torch.tanh, **kwargs})


class Wavelets(orders.Wavelets):
    """Wavelets whose output is not linear in scale and translation, and with an unused parameter."""

    def __init__(self, i, o):
        super().__init__(i, o, norm=False)
        self.dead = nn.Parameter(torch.randn(o, i))


def scaled_twice(i, o):
    """Scale the edges of both branches."""

    def forward(m, x):
        y = torch.einsum("bik,oik->bo", powers(x, 8), m.c * m.t[..., None])
        return y + torch.tanh(2 * x) @ (m.w * m.s).T

    s, t = (nn.Parameter(torch.rand(o, i) + 0.5) for _ in range(2))
    return Formula(forward, w=(o, i), s=s, c=(o, i, 8), t=t)


class Gaussians(nn.Module):
    """Gaussians of each input at trained centers and widths, which the outputs share."""

    def __init__(self, i, count=4):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(i, count))
        self.widths = nn.Parameter(torch.rand(i) + 0.5)

    def functions(self, x):
        return torch.exp(-(((x[..., None] - self.centers) * self.widths[:, None]) ** 2))


class RadialPart(nn.Module):
    def __init__(self, i, o, count=4):
        super().__init__()
        self.gaussians, self.sum = Gaussians(i, count), nn.Linear(i * count, o)

    def forward(self, x):
        return self.sum(self.gaussians.functions(x).flatten(1))


def small_networks(i, o, hidden=3, waves=2):
    """Return a layer with a network of one hidden layer on each edge; some of its axes have length one."""

    def forward(m, x):
        functions = torch.stack([x, torch.sin(2 * x)], dim=-1)
        inner = torch.tanh(torch.einsum("biw,iohw->bioh", functions, m.w1) + m.b1)
        return torch.einsum("bioh,iolh->bo", inner, m.w2)

    return Formula(forward, w1=(i, o, hidden, waves), w2=(i, o, 1, hidden), b1=(i, o, hidden))


def by_edge(i, o, order="io"):
    """Return a layer with coefficients of shape (in * out, basis) and a base branch."""

    def forward(m, x):
        table = m.table.unflatten(0, [{"i": i, "o": o}[axis] for axis in order])
        return torch.einsum(f"bik,{order}k->bo", powers(x, 4), table) + m.base(x)

    return Formula(forward, order=order, table=(i * o, 4), base=nn.Sequential(nn.SiLU(), nn.Linear(i, o)))


def by_function(i, o, of_layers=True):
    """Return a layer with a linear layer or a matrix for each function."""

    def forward(m, x):
        weights = [linear.weight for linear in m.sums] if of_layers else m.sums
        return sum(torch.tanh(x) ** k @ weight.T for k, weight in enumerate(weights))

    if of_layers:
        return Formula(forward, sums=nn.ModuleList([nn.Linear(i, o, bias=False) for _ in range(4)]))
    return Formula(forward, sums=nn.ParameterList([torch.randn(o, i) for _ in range(4)]))


class Radial(RadialPart):
    """FastKAN under other names, with fixed centers and a branch that is a `Sequential`."""

    def __init__(self, i, o):
        super().__init__(i, o)
        self.gaussians.requires_grad_(False)
        self.norm, self.branch = nn.LayerNorm(i), nn.Sequential(nn.SiLU(), nn.Linear(i, o))

    def forward(self, x):
        return super().forward(self.norm(x)) + self.branch(x)


# a layer, its sizes, the names of its coefficients, the number of functions, the name of the residual weights
SQUARE, SIZES, ORDERS = [(3, 5), (4, 4)], [(4, 4), (2, 5), (5, 1)], ["oik", "iok", "iko", "kio", "oki", "koi"]
LAYERS = [
    (small_networks, (5, 1), "w1 w2 b1", 3 * 2 + 3 + 3, None),
    (small_networks, (5, 4), "w1 w2 b1", 3 * 2 + 3 + 3, None),
    (Wavelets, (5, 4), "scale translation A", 3, None),
    (scaled_twice, (5, 4), "c s t", 8 + 2, "w"),
]
for sizes in SQUARE:
    LAYERS += [
        (by_edge, sizes, "table", 4, "base.1.weight"),
        (partial(by_edge, order="oi"), sizes, "table", 4, "base.1.weight"),
        (by_function, sizes, "sums.0.weight sums.1.weight sums.2.weight sums.3.weight", 4, None),
        (partial(by_function, of_layers=False), sizes, "sums.0 sums.1 sums.2 sums.3", 4, None),
        (Radial, sizes, "sum.weight", 4, "branch.1.weight"),
    ]
for order, residual, sizes in product(ORDERS, (None, "oi", "io"), SIZES):
    LAYERS.append((partial(Polynomials, order=order, residual=residual), sizes, "A", 4, residual and "base"))
for inner, first in product(("ik", "ki"), (True, False)):
    LAYERS.append((partial(Flat, inner=inner, first=first), (4, 6), "table", 4, None))


@pytest.mark.parametrize("make, sizes, names, functions, residual", LAYERS)
def test_the_layout_is_that_of_the_gradients(make, sizes, names, functions, residual):
    layer = make(*sizes)

    spec = get_kan_spec(layer)

    tensor = spec.locate(layer)
    assert tensor.shape == (sizes[1], sizes[0], functions)
    assert set(tensor.names) == set(names.split())
    assert (spec.residual[0] if spec.residual else None) == residual
    assert is_linear(layer, spec, tensor) == (make not in (small_networks, Wavelets, scaled_twice))
    assert_one_edge(layer, tensor, torch.rand(7, sizes[0]), mixes_inputs=make is Radial)


class Tokens(Polynomials):
    """A layer that accepts only (batch, tokens, features)."""

    def forward(self, x):
        batch, tokens, _ = x.shape
        return super().forward(x.reshape(batch * tokens, -1)).view(batch, tokens, -1)


@pytest.mark.parametrize("inputs", [2, 5])
def test_a_layer_of_tokens_is_recognized(inputs):
    layer = Tokens(inputs, 4, residual="oi")

    tensor = get_kan_spec(layer).locate(layer)

    assert tensor.shape == (4, inputs, 4)
    assert tensor.has_residual


@pytest.mark.parametrize("sizes", [(5, 4), (4, 4), (2, 8), (32, 10)])
def test_a_layer_that_normalizes_by_the_extremes_of_all_rows(sizes):
    spec = get_kan_spec(layer := Legendre(*sizes))

    assert spec.parts == (("poly_weight", "o (i k)"),)
    assert spec.residual == ("base_weight", "o i")
    assert spec.locate(layer).shape == (sizes[1], sizes[0], 4)


@pytest.mark.parametrize("outputs", [1, 3, 20])
def test_centers_and_widths_of_a_part_are_no_coefficients(outputs):
    layer = RadialPart(5, outputs)

    (row,) = find_kan_layers(nn.Sequential(layer))

    assert row.shape == (outputs, 5, 4)
    assert {name.rpartition(".")[2] for name in row.left_out} == {"centers", "widths", "bias"}


FROZEN = {
    "only the knots": lambda layer: layer,
    "all": lambda layer: layer.requires_grad_(False),
    "all but the norm": lambda layer: layer.requires_grad_(False).norm.requires_grad_(True),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("sizes", [(3, 4), (8, 2), (1, 5)])
def test_knots_are_a_grid_whatever_is_frozen(frozen, sizes):
    layer = KnotsAsParameter(*sizes)
    FROZEN[frozen](layer)

    spec = get_kan_spec(layer)

    assert spec.parts == (("table", "o i k"),)
    assert spec.residual == ("base", "o i")
    assert "knots" in spec.grid
    assert spec.grid_methods == ("update_knots",)


def test_uneven_knots_that_are_trained_are_a_grid():
    layer = KnotsAsParameter()
    layer.knots.add_(0.05 * torch.rand(layer.knots.shape)).requires_grad_()

    spec = get_kan_spec(layer)

    assert (spec.parts, spec.grid) == ((("table", "o i k"),), ("knots",))


def test_functions_that_start_as_increasing_ones_are_coefficients():
    layer = Polynomials(5, 4, order="o i k")
    layer.A.data.copy_(torch.arange(4.0).expand_as(layer.A))

    assert get_kan_spec(layer).parts == (("A", "o i k"),)


def test_a_submodule_with_submodules_or_more_parameters_is_not_searched():
    deep, large = RadialPart(5, 3), RadialPart(5, 3)
    deep.gaussians = nn.Sequential(Gaussians(5))  # a module of torch with parts
    deep.gaussians.functions = deep.gaussians[0].functions
    large.gaussians.more = nn.Parameter(torch.randn(100, 100))

    assert get_kan_spec(deep) is get_kan_spec(large) is None


def test_a_network_of_one_input_is_not_its_layer():
    network = nn.Module()
    network.kan, network.head = Polynomials(1, 64), nn.Linear(64, 10)
    network.forward = lambda x: network.head(network.kan(x))

    assert [layer.name for layer in find_kan_layers(network)] == ["kan"]


def gates(m, x, top=4):
    gates = (x @ m.gate.T).softmax(-1)
    return gates * (gates >= gates.topk(top).values[:, -1:])


def lists(how):
    """Return linear layers in a list: experts of a gate, a network, or a sum, which is one linear layer."""

    def forward(m, x):
        if how == "network":
            return reduce(lambda x, linear: torch.relu(linear(x)), m.parts, x)
        values = torch.stack([linear(x) for linear in m.parts], -1)
        if how == "experts":
            values = values * x.softmax(-1)[:, None]
        return values.sum(-1)

    return Formula(forward, parts=nn.ModuleList([nn.Linear(4, 4) for _ in range(4)]))


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


class ScaledConv(nn.Conv1d):
    def forward(self, x):
        return nn.functional.conv1d(x, 2 * self.weight)


NOT_KAN = {
    **{
        name: lambda name=name: type(name, (Formula,), {})(FORMULAS[name][0], **FORMULAS[name][1]) for name in FORMULAS
    },
    "list of experts": partial(lists, "experts"),
    "list of layers": partial(lists, "network"),
    "sum of layers": partial(lists, "sum"),
    "Conv1d": lambda: nn.Conv1d(4, 4, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "LSTM": lambda: nn.LSTM(4, 4),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2),
    "GRUCell": lambda: nn.GRUCell(4, 4),
    "a scaled convolution": lambda: ScaledConv(6, 6, 3),
}


@pytest.mark.parametrize("name", NOT_KAN)
def test_other_modules_are_not_recognized_and_not_changed(name):
    module = NOT_KAN[name]()
    before = state(module)

    assert find_kan_layers(nn.Sequential(module)) == []

    assert_equal(state(module), before)


class Fresh(Polynomials):
    """A layer that no other test looks at."""


def test_a_layer_without_values_is_recognized_once_another_of_its_class_was():
    assert get_kan_spec(Fresh(5, 4).to("meta")) is None

    for device in ("cpu", "meta"):
        assert get_kan_spec(Fresh(5, 4).to(device)).kind == "generic"


def test_formulas_of_pykan_are_no_layers():
    kan = pytest.importorskip("kan")
    model = kan.KAN(width=[2, 3, 1], grid=3, k=3, seed=0, auto_save=False)

    model.fix_symbolic(0, 0, 1, "sin", fit_params_bool=False, verbose=False, log_history=False)

    assert [layer.name for layer in find_kan_layers(model)] == ["act_fun.0", "act_fun.1"]


class SplineLinear(nn.Linear):
    """A KAN layer of a registered kind, derived from a linear layer."""

    def forward(self, x):
        return super().forward(torch.sin(torch.cat([x, 2 * x], dim=-1)))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(3)])
def test_a_model_of_registered_layers_is_no_layer(norm):
    register_kan_layer("spline-linear", matches=SplineLinear, coefficients=("weight", "o (k i)"), axes={"k": 2})

    model = Formula(lambda m, x: m.norm(m.lin(x)), lin=SplineLinear(6, 3), norm=norm)

    assert [(layer.name, layer.kind) for layer in find_kan_layers(model)] == [("lin", "spline-linear")]
