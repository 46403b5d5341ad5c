# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A user's description must agree with the layer; the description of a known kind follows the layer."""

import copy

import pytest
import torch
from helpers import adapt, assert_equal, inputs, refused, saved_and_merged, state
from orders import Flat, Layer, OtherCheby, Wavelets
from stand_ins import OldEfficientKANLayer, as_model
from torch import nn

from peft_lotra import find_kan_layers, register_kan_layer
from peft_lotra.layers.recognize import get_kan_spec


ORDERS = ["o i k", "i o k", "o k i", "k i o", "i k o", "k o i"]


def register(layer, pattern, **changes):
    register_kan_layer("mine", matches=type(layer), coefficients=("A", pattern), **changes)


def pattern_of(layer):
    return next(iter(get_kan_spec(layer).locate(layer).parameters.values())).pattern


# A layer with the names of a built-in kind and another order of (out, in)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 4), (2, 2), (4, 3), (1, 3), (3, 1)])
def test_a_chebykan_of_the_other_order_is_read_in_its_order(sizes, tmp_path):
    model = as_model(OtherCheby(*sizes))

    (row,) = find_kan_layers(model)

    assert (row.kind, row.shape) == ("generic", (*sizes[::-1], 5))
    assert pattern_of(model.kan) == "o i k"
    saved_and_merged(lambda: copy.deepcopy(model), inputs(in_features=sizes[0]), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_order_is_recognized_in_any_precision_and_context(dtype, context):
    class Fresh(OtherCheby):
        """What other tests have learned of a class is kept."""

    with context():
        assert pattern_of(Fresh(4, 4).to(dtype)) == "o i k"


def test_layers_of_one_kind_are_run_once():
    class Counted(OtherCheby):
        runs = 0

        def forward(self, x):
            Counted.runs += 1
            return super().forward(x)

    def runs_after(*layers):
        assert len(find_kan_layers(nn.Sequential(*layers))) == len(layers)
        return Counted.runs

    first = runs_after(*[Counted(4, 4) for _ in range(50)])

    assert first > 0
    assert runs_after(Counted(4, 4)) == first
    assert runs_after(Counted(4, 5)) > first  # another shape is another kind


# A layer of a known kind that no longer uses all of its parameters


class Copy(OldEfficientKANLayer):
    """A layer of efficient-kan that uses some of its parameters."""

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

    used = {"spline_weight", "base_weight"} if "base" in uses else {"spline_weight"}
    spec = get_kan_spec(build()[0])

    merged = saved_and_merged(build, torch.rand(8, 4), tmp_path)

    assert set(spec.locate(build()[0]).parameters) == used
    assert spec.kind == ("efficient-kan" if "base" in uses else "generic")
    assert type(merged[0]) is Copy
    for name in {"base_weight", "spline_scaler"} - used:
        assert_equal(merged[0].get_parameter(name), build()[0].get_parameter(name))


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
    layer = Layer(5, 5, 5, order, **norms)  # all axes have one length

    for described in ORDERS:
        register(layer, described)
        if described == order:
            adapt(as_model(layer))
        else:
            with refused(f"its gradients are those of {order!r}"):
                adapt(as_model(layer))


class NormedPair(OldEfficientKANLayer):
    """A layer whose two normalized outputs are constant up to rounding, so that gradients tell nothing."""

    def forward(self, x):
        return nn.functional.layer_norm(super().forward(x), (2,))


def test_a_layer_that_mixes_inputs_contradicts_nothing():
    layer = Layer(5, 4, 5, before=nn.Linear(5, 5))
    register(layer, "o i k")

    adapt(as_model(layer))


def test_a_layer_with_constant_outputs_contradicts_nothing():
    adapt(as_model(NormedPair(4, 2)))


class Named(Layer):
    """A layer with residual weights and unused weights."""

    def __init__(self):
        super().__init__(3, 4, residual="oi")
        self.unused = nn.Parameter(torch.randn(4, 3, 2))


@pytest.mark.parametrize(
    "layer, right, wrong, words",
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
    description = {"coefficients": right, "axes": {"i": 4} if isinstance(layer, Flat) else None}
    register_kan_layer("mine", matches=type(layer), **{**description, **wrong})
    model = as_model(layer)

    with refused(words, model) as error:
        adapt(model)

    assert type(layer).__name__ in str(error.value)
    assert "'mine'" in str(error.value)
    assert model.kan is layer
    register_kan_layer("mine", matches=type(layer), **description)
    adapt(model)


def test_a_layer_that_is_not_linear_takes_the_general_path():
    coefficients = [(name, "o i") for name in ("scale", "translation", "A")]
    basis = lambda m, x: x[..., None].expand(-1, -1, 3)  # noqa: E731
    register_kan_layer("mine", matches=Wavelets, coefficients=coefficients, basis=basis)
    model, x = as_model(Wavelets()).eval(), inputs(6)

    (row,) = find_kan_layers(model)
    adapted = adapt(model)
    y = adapted(x)

    assert row.runs_by == "forward"
    torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)


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
    assert adapt(as_model(layer)).base_model.model.kan.lotra_tensor.shape == (5, 5, 5)


def test_parameters_without_values_are_not_verified():
    layer = Layer(5, 5, 6).to("meta")
    register(layer, "i o k")

    assert adapt(as_model(layer)).base_model.model.kan.lotra_tensor.shape == (5, 5, 6)


def test_parameters_that_are_computed_are_listed():
    layer = nn.utils.parametrizations.weight_norm(Layer(5, 5, 5), "A")
    register(layer, "o i k")

    assert find_kan_layers(as_model(layer))[0].shape == (5, 5, 5)


def test_the_layer_is_left_as_it_was():
    class Noisy(Layer):
        def forward(self, x):
            self.last = x
            return nn.functional.dropout(super().forward(x), training=self.training) + 0 * torch.rand(())

    layer = Noisy(5, 5, 5, before=nn.BatchNorm1d(5), after=nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5))).train()
    layer.before.eval()
    layer.A.requires_grad_(False)
    layer.before.weight.grad = torch.ones(5)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    layer.after.register_forward_pre_hook(lambda *args: calls.append(1))
    register(layer, "o i k")

    def flags():
        modules = [(m.training, len(m._forward_hooks), set(vars(m))) for m in layer.modules()]
        parameters = [(p.requires_grad, p.grad is None, p._version) for p in layer.parameters()]
        buffers = [buffer._version for buffer in layer.buffers()]
        return modules, parameters, buffers, torch.get_rng_state().tolist()

    expected, before = flags(), state(layer)

    assert find_kan_layers(layer)[0].kind == "mine"

    assert not calls
    assert flags() == expected
    assert_equal(state(layer), before)
