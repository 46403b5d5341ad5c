# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Descriptions and layers: a user's must agree, that of a known kind follows the layer, and nothing is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapt, inputs, saved_and_merged
from orders import Flat, Layer, OtherCheby, Wavelets
from stand_ins import OldEfficientKANLayer, as_model
from torch import nn

from peft_lotra import check_kan_layer, find_kan_layers, register_kan_layer
from peft_lotra.layers.registry import get_kan_spec


ORDERS = ["o i k", "i o k", "o k i", "k i o", "i k o", "k o i"]
AS_DESCRIBED = "outputs as described, inputs as described"


def register(layer, pattern, **changes):
    register_kan_layer("mine", matches=type(layer), coefficients=("A", pattern), **changes)


def pattern_of(layer):
    return next(iter(get_kan_spec(layer).locate(layer).parameters.values())).pattern


# A layer of a built-in kind by its names, that stores (out, in) the other way


@pytest.mark.parametrize("sizes", [(3, 4), (4, 4), (2, 2), (4, 3), (1, 3), (3, 1)])
def test_a_chebykan_of_the_other_order_is_read_in_its_order(sizes, tmp_path):
    model = as_model(OtherCheby(*sizes))
    (found,) = find_kan_layers(model)
    assert (found.family, found.shape) == ("generic", (*sizes[::-1], 5)) and pattern_of(model.kan) == "o i k"
    saved_and_merged(lambda: copy.deepcopy(model), inputs(in_features=sizes[0]), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_in_any_precision_and_context(dtype, context):
    with context():
        assert pattern_of(OtherCheby(4, 4).to(dtype)) == "o i k"


def test_layers_of_one_kind_are_run_once():
    ran = []

    class Counted(OtherCheby):
        def forward(self, x):
            ran.append(1)
            return super().forward(x)

    counts = [0]
    for layers in ([Counted(4, 4) for _ in range(50)], [Counted(4, 4)], [Counted(4, 5)]):
        assert len(find_kan_layers(nn.Sequential(*layers))) == len(layers)
        counts.append(len(ran))
    assert counts[0] < counts[1] == counts[2] < counts[3]  # another shape is another kind


# A layer of a known kind that no longer uses all of its parameters


class Copy(OldEfficientKANLayer):
    """A layer of efficient-kan, whose parameters are not all used."""

    def __init__(self, i, o, uses=("base", "scale")):
        super().__init__(i, o)
        self.uses = " ".join(uses)  # a setting: another kind of layer

    def forward(self, x):
        weight = self.scaled_spline_weight if "scale" in self.uses else self.spline_weight
        y = self.b_splines(x).flatten(1) @ weight.flatten(1).T
        return y + nn.functional.silu(x) @ self.base_weight.T if "base" in self.uses else y


@pytest.mark.parametrize("uses", [("base",), ("scale",), ()])
def test_parameters_that_a_copy_no_longer_uses_are_left_out(uses, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Copy(4, 5, uses), Copy(5, 2, uses))

    expected = {"spline_weight", *(["base_weight"] if "base" in uses else [])}
    spec = get_kan_spec(build()[0])
    assert set(spec.locate(build()[0]).parameters) == expected
    assert spec.family == ("efficient-kan" if "base" in uses else "generic")
    merged = saved_and_merged(build, torch.rand(8, 4), tmp_path)
    assert type(merged[0]) is Copy
    for name in {"base_weight", "spline_scaler"} - expected:
        assert torch.equal(merged[0].get_parameter(name), build()[0].get_parameter(name))


def test_a_layer_that_cannot_be_run_is_as_described_until_it_can():
    assert get_kan_spec(Copy(4, 7, uses=()).to("meta")).residual is not None
    assert get_kan_spec(Copy(4, 7, uses=())).residual is None


# What a user describes


NORMS = [
    {},
    {"before": nn.LayerNorm(5)},
    {"after": nn.LayerNorm(5)},
    {"before": nn.BatchNorm1d(5), "after": nn.BatchNorm1d(5)},
    {"before": nn.Sequential(nn.LayerNorm(5), nn.Tanh()), "after": nn.Sequential(nn.LayerNorm(5), nn.SiLU())},
    {"after": nn.Linear(5, 5)},
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norms", NORMS)
def test_only_the_order_in_which_it_is_stored_is_verified(norms, order):
    layer = Layer(5, 5, 5, order, **norms)  # where no size gives it away
    for other in ORDERS:
        register(layer, other)
        report = check_kan_layer(layer)
        assert (report.axes == AS_DESCRIBED) == (other == order)
        assert report.contradiction.endswith(f"its gradients are those of {order!r}") == (other != order)
    register(layer, f"{order[2:]} {order[0]}")  # the outputs elsewhere
    with pytest.raises(ValueError, match=f"not laid out as .*, its gradients are those of {order!r}"):
        adapt(as_model(layer))


class NormedPair(OldEfficientKANLayer):
    """The norm of two outputs is constant but for rounding, and tells nothing of the sum."""

    def forward(self, x):
        return nn.functional.layer_norm(super().forward(x), (2,))


def test_a_layer_that_mixes_inputs_or_outputs_contradicts_nothing():
    layer = Layer(5, 4, 5, before=nn.Linear(5, 5))
    register(layer, "o i k")
    assert check_kan_layer(layer).axes == "outputs as described, inputs mixed by the layer, or not as described"
    assert "not checked" in check_kan_layer(pair := NormedPair(4, 2)).axes
    for each in (layer, pair):
        adapt(as_model(each))


class Named(Layer):
    """A layer with residual weights, and weights of no use."""

    def __init__(self):
        super().__init__(3, 4, residual="oi")
        self.unused = nn.Parameter(torch.randn(4, 3, 2))


@pytest.mark.parametrize(
    ("layer", "right", "wrong", "words"),
    [
        (Layer(5, 5, 5, "o k i"), ("A", "o k i"), {"coefficients": ("A", "o i k")}, "`A` .5, 5, 5. is not laid out"),
        (Layer(3, 4, 5), ("A", "o i k"), {"coefficients": ("A", "k o i")}, "its gradients are those of 'o i k'"),
        (
            Flat(4, 3, inner="ki"),
            ("table", "o (k i)"),
            {"coefficients": ("table", "o (i k)")},
            "its gradients are those of 'o .k i.'",
        ),
        (Named(), ("A", "o i k"), {"residual": ("base", "i o")}, "`base` is not as described.*'i o'.*4, 3"),
        (Named(), ("A", "o i k"), {"coefficients": ("B", "o i k")}, "`B` is not as described. There is no such"),
    ],
)
def test_a_contradiction_is_refused_by_name(layer, right, wrong, words):
    described = {"coefficients": right, "axes": {"i": 4} if isinstance(layer, Flat) else None}
    register_kan_layer("mine", matches=type(layer), **{**described, **wrong})
    before, model = copy.deepcopy(layer.state_dict()), as_model(layer)
    with pytest.raises(ValueError, match=words) as error:
        adapt(model)
    assert type(layer).__name__ in str(error.value) and "'mine'" in str(error.value)
    assert model.kan is layer and all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    register_kan_layer("mine", matches=type(layer), **described)
    adapt(model)


def test_a_layer_that_is_not_linear_takes_the_general_path():
    parts = [(name, "o i") for name in ("scale", "translation", "A")]
    register_kan_layer("mine", matches=Wavelets, coefficients=parts, basis=lambda m, x: x[..., None].expand(-1, -1, 3))
    base, x = as_model(Wavelets()).eval(), inputs(6)
    report = check_kan_layer(base.kan)
    assert report.linear == "no" and report.fast_path.startswith("no, since its output is not linear")
    y = (model := adapt(base))(x)
    assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-5)


def test_a_setting_makes_another_kind_of_layer():
    class Either(Layer):
        def __init__(self, turned):
            super().__init__(4, 4, 5)
            self.order = "iok" if turned else "oik"  # a setting

    register(Either(True), "o i k")
    adapt(as_model(Either(False)))
    with pytest.raises(ValueError, match="is not laid out as 'o i k'"):
        adapt(as_model(Either(True)))


# Layers that cannot be run


NOT_CALLED = {
    "two inputs": lambda self, x, edges: Layer.forward(self, x) + edges.sum(),
    "a dict": lambda self, x: {"y": Layer.forward(self, x)},
    "no gradient": lambda self, x: Layer.forward(self, x).detach(),
    "NaN": lambda self, x: Layer.forward(self, x) * torch.nan,
}


@pytest.mark.parametrize("kind", NOT_CALLED)
def test_layers_that_cannot_be_called_are_not_verified_and_attached(kind):
    layer = type("Odd", (Layer,), {"forward": NOT_CALLED[kind]})(5, 5, 5)
    register(layer, "o i k")
    assert check_kan_layer(layer).axes.startswith("not checked: ")
    assert adapt(as_model(layer)).base_model.model.kan.lotra_tensor.shape == (5, 5, 5)


def test_parameters_without_values_are_not_verified():
    register(Layer(2, 2, 2), "o i k")
    assert check_kan_layer(Layer(5, 5, 6).to("meta")).axes.startswith("not checked: `A` has no values")
    computed = nn.utils.parametrizations.weight_norm(Layer(5, 5, 5), "A")
    register_kan_layer("computed", matches=type(computed), coefficients=("A", "o i k"))
    assert find_kan_layers(as_model(computed))[0].shape == (5, 5, 5)


def test_the_layer_is_left_as_it_was():
    class Noisy(Layer):
        def forward(self, x):
            self.last = x
            return nn.functional.dropout(super().forward(x), training=self.training) + 0 * torch.rand(())

    layer = Noisy(5, 5, 5, before=nn.BatchNorm1d(5), after=nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5))).train()
    layer.before.eval()
    layer.A.requires_grad_(False)
    layer.before.weight.grad = torch.ones(5)
    ran = []
    layer.register_forward_hook(lambda *args: ran.append(1))
    layer.after.register_forward_pre_hook(lambda *args: ran.append(1))

    def state():
        modules = [(m.training, len(m._forward_hooks), set(vars(m))) for m in layer.modules()]
        flags = [(p.requires_grad, p.grad is None, p._version) for p in layer.parameters()]
        return modules, flags, [b._version for b in layer.buffers()], torch.get_rng_state().tolist()

    before, tensors = state(), copy.deepcopy(layer.state_dict())
    register(layer, "o i k")
    assert check_kan_layer(layer).axes == AS_DESCRIBED
    assert state() == before and not ran
    assert all(torch.equal(value, tensors[name]) for name, value in layer.state_dict().items())
