# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers from public repositories, which are recognized at all sizes."""

import copy
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import assert_equal, assert_same, refused, relative, snapshot
from orders import Formula, Wavelets, skan
from peft import get_peft_model
from stand_ins import (
    FixedFunctions,
    PhysicsNeMoFourierLayer,
    TrainedGaussians,
)
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, register_kan_layer
from peft_lotra.kan import KANLinear


def projected_chebyshev(inputs, outputs, degree=3):
    """Return Chebyshev polynomials of the outputs of a projection."""

    def forward(m, x):
        angle = torch.tanh(m.projection(x)).clamp(-0.999, 0.999).acos()
        return torch.einsum("bik,iok->bo", torch.cos(angle[..., None] * torch.arange(degree + 1)), m.polynomials)

    return Formula(forward, projection=nn.Linear(inputs, 5), polynomials=(5, outputs, degree + 1))


def polynomials_of_channels(inputs, outputs):
    """Return polynomials over the channels of (batch, channels, points)."""

    def forward(m, x):
        return torch.einsum("bink,oik->bon", torch.tanh(x)[..., None] ** torch.arange(4), m.weights)

    return Formula(forward, weights=(outputs, inputs, 4))


def polynomial_units(inputs, outputs, turned=False):
    """Return a polynomial for each unit, and a linear layer: no KAN layer, since the outputs share the functions."""

    def forward(m, x):
        weights = m.weights.T if turned else m.weights
        return m.head((torch.tanh(x)[..., None] ** torch.arange(4) * weights).sum(-1))

    return Formula(forward, weights=(4, inputs) if turned else (inputs, 4), head=nn.Linear(inputs, outputs))


def radial_functions(inputs, outputs):
    """Return Gaussians of the whole input, and a linear layer: no KAN layer."""

    def forward(m, x):
        return m.head(torch.exp(-((x[..., None, :] - m.centers) ** 2).sum(-1) * m.widths))

    return Formula(forward, centers=(8, inputs), widths=nn.Parameter(torch.ones(8)), head=nn.Linear(8, outputs))


def functions_of_slices(inputs, outputs):
    """Return FC-KAN: another kind of function, with its own coefficients, for each slice of (2, batch, in)."""
    steps = torch.arange(1, 6)

    def forward(m, x):
        outputs = [(torch.tanh(x[0])[..., None] ** steps).flatten(-2) @ m.powers.T]
        outputs += [torch.sin(part[..., None] * steps).flatten(-2) @ m.waves.T for part in x[1:]]
        return torch.stack(outputs)

    return Formula(forward, powers=(outputs, 5 * inputs), waves=(outputs, 5 * inputs))


SIZES = [(20, 20), (20, 3), (20, 16), (20, 1), (16, 20), (12, 24), (7, 5), (1, 4), (1, 1), (2, 1), (2, 2), (24, 12)]


def recognize(layer):
    """Return the description of a KAN layer."""
    (row,) = find_kan_layers(nn.Sequential(layer))
    return row


@pytest.mark.parametrize("functions", ["gaussians", "polynomials"])
@pytest.mark.parametrize("inner", ["i k", "k i"])
@pytest.mark.parametrize("inputs, outputs", SIZES)
def test_a_linear_layer_on_fixed_functions_is_found(inputs, outputs, inner, functions):
    row = recognize(FixedFunctions(inputs, outputs, inner=inner, functions=functions))

    assert row.shape == (outputs, inputs, 6)
    assert row.parameters == ("head.weight",)


@pytest.mark.parametrize("inputs, outputs", [*SIZES, (20, 2), (8, 2), (7, 2), (4, 4), (3, 20)])
def test_centers_and_widths_that_the_outputs_share_are_no_coefficients(inputs, outputs):
    row = recognize(TrainedGaussians(inputs, outputs))

    assert row.parameters == ("coefficients",)
    assert row.shape == (outputs, inputs, 8)
    assert set(row.left_out) == {"centers", "log_width"}


@pytest.mark.parametrize("outputs", [1, 4])
def test_centers_and_widths_are_no_coefficients_whatever_is_frozen(outputs):
    trained, frozen = TrainedGaussians(5, outputs), TrainedGaussians(5, outputs)
    partly = TrainedGaussians(5, outputs)
    frozen.requires_grad_(False)
    partly.centers.requires_grad_(False)
    partly.log_width.requires_grad_(False)

    for order in ([trained, partly, frozen], [frozen, partly, trained]):
        for layer in order:
            assert recognize(layer).parameters == ("coefficients",)


class WithLinearBase(TrainedGaussians):
    """Adds a linear layer of the inputs."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.base = nn.Linear(inputs, outputs)

    def forward(self, x):
        return super().forward(x) + self.base(nn.functional.silu(x))


class WithOutputScale(TrainedGaussians):
    """Multiplies each output, and adds a bias."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.scale, self.bias = (nn.Parameter(torch.rand(outputs) + 0.5) for _ in range(2))

    def forward(self, x):
        return self.scale * super().forward(x) + self.bias


def test_a_scale_of_each_output_is_left_out():
    row = recognize(WithOutputScale(3, 4))

    assert row.parameters == ("coefficients",)
    assert {"scale", "bias"} < set(row.left_out)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("inputs", [1, 2, 5])
def test_a_linear_layer_beside_functions_is_the_residual_branch_of_one_input_too(inputs, outputs):
    row = recognize(WithLinearBase(inputs, outputs))

    assert row.parameters == ("coefficients", "base.weight")
    assert row.has_residual


@pytest.mark.parametrize(
    "make", [polynomial_units, partial(polynomial_units, turned=True), radial_functions, projected_chebyshev, skan]
)
@pytest.mark.parametrize("inputs, outputs", [*SIZES, (8, 8), (4, 8), (8, 4), (5, 5)])
def test_what_is_no_sum_of_functions_is_not_reported(make, inputs, outputs):
    model = nn.Sequential(make(inputs, outputs))

    assert find_kan_layers(model) == []


def adapt_registered(model, **description):
    register_kan_layer("mine", matches=type(model[0]), **description)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoTRAConfig(r=1, init_weights=False)).eval()


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(8, 8), (8, 6), (6, 8), (5, 5), (1, 1), (2, 2), (8, 9), (9, 8), (5, 1)]
)
@pytest.mark.parametrize(
    "make, coefficients",
    [
        (skan, ("weight", "o i")),
        (projected_chebyshev, ("polynomials", "i o k")),
        (polynomials_of_channels, ("weights", "o i k")),
    ],
)
def test_a_registration_that_is_right_is_taken_at_all_sizes(make, coefficients, inputs, outputs):
    base = nn.Sequential(make(inputs, outputs))
    x = torch.rand(6, inputs, 3) if make is polynomials_of_channels else torch.rand(6, inputs)
    base_output = base(x)

    model = adapt_registered(base, coefficients=coefficients)

    y = model(x)
    assert not torch.allclose(y, base_output)
    assert relative(model.merge_and_unload()(x), y) < 1e-5


@pytest.mark.parametrize("coefficients", [("polynomials", "o i k"), ("polynomials", "k i o")])
def test_a_registration_that_gradients_cannot_verify_is_accepted(coefficients):
    """The inputs are mixed before the sum, so no layout can be verified."""
    adapt_registered(nn.Sequential(projected_chebyshev(4, 5)), coefficients=coefficients)


@pytest.mark.parametrize("inputs, outputs", [(8, 8), (7, 5), (3, 1)])
def test_polynomials_of_channels_are_found(inputs, outputs):
    row = recognize(polynomials_of_channels(inputs, outputs))

    assert row.shape == (outputs, inputs, 4)


class Network(nn.Module):
    """A network whose layer gets two slices of one input, and which has further arguments."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.slices = functions_of_slices(3, 4)

    def forward(self, x, scale):
        x = self.norm(x)
        return self.slices(torch.stack([x, scale * x])).sum(0)


def test_coefficients_that_other_slices_of_the_input_use_are_seen():
    rows = find_kan_layers(Network(), torch.rand(6, 3), scale=0.5)

    (layer,) = rows
    assert layer.parameters == ("powers",)
    assert layer.left_out == ("waves",)
    assert "slices leaves out waves" in str(rows)
    assert not rows.unrecognized


def test_coefficients_that_other_slices_use_can_be_registered():
    base = Network().eval()
    coefficients = [("powers", "o (i k)"), ("waves", "o (i m)")]
    register_kan_layer("slices", matches=Formula, coefficients=coefficients, axes={"i": 3})

    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, init_weights=False)).eval()

    x = torch.rand(6, 3)
    y = model(x, 0.5)
    merged = model.merge_and_unload()
    assert relative(merged(x, 0.5), y) < 1e-5
    assert not torch.equal(merged.slices.waves, base.slices.waves)


class Counting(nn.Module):
    """Counts its passes, keeps the last output, and refuses more than four samples."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3), KANLinear(3, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        self.steps += 1
        self.last = self.layer(self.norm(x + torch.rand(())))
        assert len(x) <= 4
        return self.last


@pytest.mark.parametrize("samples, expectation", [(4, nullcontext()), (5, pytest.raises(AssertionError))])
def test_a_model_is_left_as_it_was_also_by_a_run_that_fails(samples, expectation):
    model = Counting()
    before, generator_state = snapshot(model), torch.get_rng_state()

    with expectation:
        find_kan_layers(model, torch.ones(samples, 3))

    assert_same(model, before)
    assert_equal(torch.get_rng_state(), generator_state)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert model.passes == 0


class Edges(nn.Module):
    """A layer that also takes a graph."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 3, 5))

    def forward(self, x, edges, scale):
        return torch.einsum("bik,oik->bo", torch.tanh(x)[..., None] ** torch.arange(5), self.weights) * scale


def test_modules_of_a_class_that_is_recognized_elsewhere_are_named_in_one_warning():
    class Maybe(FixedFunctions):
        def forward(self, x):
            return super().forward(x) if self.count == 6 else x

    model = nn.ModuleList([Maybe(3, 4), Maybe(3, 4, count=5), Maybe(4, 4, count=5)])

    with pytest.warns(UserWarning, match="^`1` .*, `2` .* may be KAN layers, but were not recognized") as records:
        get_peft_model(model, LoTRAConfig(r=1))
    assert len([warning for warning in records if "may be" in str(warning.message)]) == 1


@pytest.mark.parametrize("inputs, outputs", [(1, 1), (1, 5), (2, 1), (2, 2), (7, 3)])
def test_scales_and_translations_of_wavelets_are_coefficients_at_all_sizes(inputs, outputs):
    row = recognize(Wavelets(inputs, outputs, norm=False))

    assert {"scale", "translation"} < set(row.parameters)


class FourierWithBase(PhysicsNeMoFourierLayer):
    """ikan's FourierKANLinear: a known parameter, and weights of silu that this kind does not have."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.base_weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return super().forward(x) + nn.functional.silu(x) @ self.base_weight.T


@pytest.mark.parametrize("inputs, outputs", [(3, 5), (4, 4), (1, 1), (7, 1)])
def test_a_copy_of_a_known_layer_with_further_weights_gets_adapters_of_these_too(inputs, outputs):
    row = recognize(FourierWithBase(inputs, outputs))

    assert set(row.parameters) == {"fourier_coeffs", "base_weight"}


class SometimesShifted(FixedFunctions):
    """Uses a parameter at some inputs only."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.shift = nn.Parameter(torch.ones(outputs, 2))

    def forward(self, x):
        y = super().forward(x)
        return y + self.shift.sum(1) if x.abs().max() > 0.3 else y


def test_a_parameter_that_is_used_at_some_inputs_does_not_stop_the_search():
    assert len(find_kan_layers(nn.Sequential(SometimesShifted(3, 4), KANLinear(4, 2)))) == 2


class Normalized(nn.Module):
    """A sum of functions whose coefficients are divided by their norm, along these axes."""

    def __init__(self, inputs, outputs, axes=(1, 2)):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(outputs, inputs, 3))
        self.axes = axes

    def forward(self, x):
        functions = torch.stack([x, x**2, x.sin()], -1)
        return torch.einsum("bik,oik->bo", functions, self.weights / self.weights.norm(dim=self.axes, keepdim=True))


@pytest.mark.parametrize("kind", [tuple, list])
def test_layers_of_one_class_may_differ_in_a_setting_with_several_values(kind):
    """The functions of an edge may have a norm of their own, a norm of an output mixes the inputs."""
    model = nn.Sequential(*[Normalized(3, 4, kind(axes)) for axes in ((1, 2), (2,))])

    rows = find_kan_layers(model)

    assert [row.name for row in rows] == ["1"]
    assert [module.name for module in rows.unrecognized] == ["0"]


@pytest.mark.parametrize(
    "module, reason",
    [
        (nn.Linear(3, 4), "Linear is a container, a module of a library, or derived from one"),
        (nn.Sequential(nn.Tanh()), "Sequential is a container"),
        (radial_functions(3, 4), "`centers`, `head.weight` are not coefficients of a sum, over its inputs"),
        (Normalized(3, 4), "`weights` are not coefficients of a sum.*normalized ones, or mixed by gates, do not"),
        (Edges(), "the layer raised TypeError: Edges.forward.. missing 2 required positional arguments"),
        (FixedFunctions(3, 4).to("meta"), "`head.weight` has no values"),
    ],
)
def test_a_module_that_is_no_kan_layer_gives_the_reason(module, reason):
    with refused(f"not a KAN layer that LoTRA knows: {reason}"):
        get_peft_model(nn.ModuleList([module]), LoTRAConfig(target_modules=["0"]))
