# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
import torch._dynamo.testing
from helpers import adapt, inputs, lotra_layers
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import register_kan_layer
from peft_lotra.families import registry
from peft_lotra.tuner import fast_path


CLOSED_FORM = ["own", "efficient-kan", "efficient-kan-no-scaler", "efficient-kan-old", "inkan"]
BY_BASIS = ["fast-kan", "faster-kan", "cheby-kan", "pina"]


def adapted(family, in_features=5, out_features=40, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    model = adapt(as_model(FAMILIES[family](in_features, out_features).to(dtype)), **kwargs)
    (layer,) = lotra_layers(model).values()
    return model, layer


def universal(model):
    """The same model, without the fast path."""
    model = copy.deepcopy(model)
    for layer in lotra_layers(model).values():
        layer._look_at_base = lambda adapters: None
        layer.lotra_formula = None
    return model


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return y, *torch.autograd.grad(y.square().mean(), [x, *parameters])


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_take_it(family):
    _, layer = adapted(family)
    if family in CLOSED_FORM or family in BY_BASIS:
        assert layer.lotra_formula.closed_form == (family in CLOSED_FORM)
    else:
        assert layer.lotra_formula is None


# two ranks: one whose thin products pay, and one for which the update is formed; few rows, and many
@pytest.mark.parametrize("r", [2, (30, 4, 3)])
@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("family", CLOSED_FORM + BY_BASIS)
def test_equals_the_universal_path(family, rows, r):
    model, _ = adapted(family, r=r)
    x = inputs(rows, in_features=5)
    fast, slow = output_and_gradients(model, x), output_and_gradients(universal(model), x)
    for result, expected in zip(fast, slow, strict=True):
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("r", [2, (30, 4, 3)])
@pytest.mark.parametrize("rows", [3, 100])
def test_equals_the_universal_path_in_double_precision(rows, r):
    model, layer = adapted("own", r=r, dtype=torch.float64)
    assert layer.lotra_formula.closed_form and layer.lotra_formula.leading_shape
    x = inputs(rows, torch.float64, 5)
    for result, expected in zip(
        output_and_gradients(model, x), output_and_gradients(universal(model), x), strict=True
    ):
        assert (result - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_grid_that_is_not_uniform_is_evaluated_by_the_layer():
    layer = FAMILIES["efficient-kan"](5, 40)
    layer.grid += torch.linspace(0, 1, layer.grid.shape[1]) ** 2 / 4
    (lotra,) = lotra_layers(adapt(as_model(layer))).values()
    assert not lotra.lotra_formula.closed_form and lotra.lotra_formula.leading_shape


def test_a_layer_that_computes_something_else_takes_the_universal_path():
    class Louder(type(FAMILIES["efficient-kan"](2, 2))):
        def forward(self, x):
            return 2 * super().forward(x)

    (layer,) = lotra_layers(adapt(as_model(Louder(5, 40)))).values()
    assert layer.lotra_formula is None


def test_a_layer_with_dropout_takes_the_universal_path_in_training():
    class Dropping(type(FAMILIES["efficient-kan"](2, 2))):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    base = as_model(Dropping(5, 40)).eval()
    model = adapt(base)
    (layer,) = lotra_layers(model).values()
    x = inputs(100, in_features=5)
    model.eval()(x)
    assert layer.lotra_formula is not None
    y = model.train()(x)
    assert layer.lotra_formula is None and 0.3 < (y == 0).float().mean() < 0.7


@pytest.fixture
def registered(monkeypatch):
    """Registers a copy of the family of FastKAN with changes, for one test."""
    monkeypatch.setitem(registry._SPECS, "broken", registry._SPECS["fast-kan"])  # and at the end there is none
    monkeypatch.setattr(fast_path, "_warned", set())

    def register(**changes):
        spec = registry._SPECS["fast-kan"]
        names = [field.name for field in fields(spec) if field.init and field.name != "family"]
        return register_kan_layer("broken", **{name: getattr(spec, name) for name in names} | changes)

    return register


def fail(*args):
    raise ZeroDivisionError("by hand")


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"basis": fail}, "`basis` of the KAN family 'broken' raised ZeroDivisionError: by hand, for a FastKANLayer"),
        ({"splines": fail, "basis": None}, "`splines` of .* raised ZeroDivisionError"),
        ({"activation": fail}, "`activation` of .* raised ZeroDivisionError"),
        ({"scale": fail}, "`scale` of .* raised ZeroDivisionError"),
        ({"basis": lambda m, x: x}, r"`basis` of .* returned \(144, 5\), torch.float32 instead of \(144, 5, 8\)"),
        ({"basis": lambda m, x: m.rbf(x).double()}, r"returned \(144, 5, 8\), torch.float64 instead of"),
        ({"activation": lambda m, x: None}, r"`activation` of .* returned NoneType instead of \(144, 5\)"),
        ({"bias": "spline_linear.weight"}, r"`bias` of .* has the shape \(40, 40\) instead of \(40,\)"),
    ],
)
def test_a_function_of_a_family_that_fails_is_named_once(changes, problem, registered):
    registered(**changes)
    with pytest.warns(UserWarning, match=problem) as warned:
        model, layer = adapted("fast-kan")
        adapted("fast-kan")
    assert layer.lotra_formula is None and sum("of the KAN family" in str(w.message) for w in warned) == 1
    x = inputs(3, in_features=5)
    assert torch.equal(model(x), universal(model)(x))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", [{}, {"activation": None}, {"scale": lambda m: None}, {"basis": None}])
def test_what_a_family_leaves_out_is_no_failure(changes, registered):
    registered(**changes)
    _, layer = adapted("fast-kan")
    assert (layer.lotra_formula is None) == ({"activation", "basis"} >= set(changes) != set())


def test_a_formula_is_not_lost_by_an_autocast_call():
    model, layer = adapted("own")
    x = inputs(3, in_features=5)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x)
    assert layer.lotra_formula is not None


def test_looking_for_the_formula_changes_nothing():
    class Counting(type(FAMILIES["efficient-kan"](2, 2))):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    layer = Counting(5, 40)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    adapt(as_model(layer), random=False)
    assert layer.calls == 0
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def test_hooks_of_the_base_layer_run():
    model, layer = adapted("own")
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    y = model(inputs(3, in_features=5))
    assert len(seen) == 1 and torch.equal(seen[0], y)


def test_wrong_last_dimension_is_the_base_layers_error():
    model, _ = adapted("own")
    with pytest.raises(ValueError, match=r"\(3, 4\).* 5"):
        model(torch.zeros(3, 4))


@pytest.mark.parametrize("family", ["own", "efficient-kan", "fast-kan"])
def test_any_leading_shape(family):
    model, _ = adapted(family)
    x = inputs(12, in_features=5)
    torch.testing.assert_close(model(x.view(3, 4, 5)), model(x).view(3, 4, -1))


@pytest.mark.parametrize("shape", [(0, 5), (5,)])
def test_no_rows_and_one(shape):
    model, _ = adapted("own")
    assert model(torch.zeros(shape)).shape == (*shape[:-1], 40)


@pytest.mark.slow
def test_compiles_once_for_all_batch_sizes():
    model, _ = adapted("own")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 64, 100, 1000):
        x = inputs(rows, in_features=5)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("bound", [6.0, 60.0])
def test_a_layer_that_clamps_far_inputs_takes_the_universal_path(bound):
    class Clamped(type(FAMILIES["efficient-kan"](2, 2))):
        def forward(self, x):
            return super().forward(x.clamp(-bound, bound))

    torch.manual_seed(0)
    model = adapt(as_model(Clamped(5, 4)))
    (layer,) = lotra_layers(model).values()
    assert layer.lotra_formula is None
    x = 200 * inputs(8, in_features=5)
    expected = universal(model)(x)
    assert torch.equal(model(x), expected)


def test_an_attribute_that_is_set_on_the_adapted_layer_is_noticed():
    model, layer = adapted("efficient-kan")
    x = inputs(8, in_features=5)
    model(x)
    assert layer.lotra_formula is not None
    activation = layer.base_activation
    layer.base_activation = nn.ReLU()
    torch.testing.assert_close(model(x), universal(model)(x))
    forward = type(layer.base_layer).forward
    layer.forward_of_base = None  # an attribute of the adapted layer, since the base layer has none of this name
    layer.base_layer.bound = 0.1
    layer.base_layer.forward = lambda x: forward(layer.base_layer, x.clamp(-layer.base_layer.bound, 0.1))
    layer.bound = 0.2
    model(x)
    assert layer.lotra_formula is None
    del layer.base_layer.forward
    layer.base_activation = activation
    model(x)
    assert layer.lotra_formula is not None
