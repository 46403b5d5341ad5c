# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Closed forms of jets of layers and networks of other libraries."""

import operator

import pytest
import torch
from foreign import Loop, efficient, make_foreign
from helpers import assert_equal, state
from jet_helpers import assert_same, nested
from orders import Formula
from stand_ins import FastKANLayer, OldEfficientKANLayer
from torch import nn
from torch.testing import assert_close

from peft_lotra import register_kan_layer
from peft_lotra.derivatives import bases as functions
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.kan import jet
from peft_lotra.layers.derivatives import find_stages


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:Adapters have more", "ignore:std")


def inside(rows=6, size=2):
    return torch.rand(rows, size, dtype=torch.float64) * 0.9 + 0.05


def loss_gradients(derivatives, tensors):
    loss = sum(derivative.square().sum() for derivative in derivatives)
    return torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)


def bases(model):
    return {type(stage.formula.basis).__name__ for stage in stages_of(model)}


def test_knots_may_become_uneven_and_even_again():
    model = efficient().float()
    x = inside(40).float()
    before = state(model)
    assert bases(model) == {"UniformGrid"}

    for layer in model.layers:
        layer.grid += 0.1 * torch.rand(layer.grid.shape).sort(-1).values

    assert bases(model) == {"FunctionBasis"}
    assert_same(jet(model, x), nested(model, x), 1e-4)
    x = inside(40)
    assert_same(jet(model.double(), x), nested(model, x), 1e-9)
    x = x.float()
    model.float().load_state_dict(before)
    assert_same(jet(model, x), nested(model, x), 1e-4)


class Gained(Loop):
    gain = power = 1

    def forward(self, x):
        y = super().forward(x)
        return y if self.gain == self.power == 1 else self.gain * y**self.power


@pytest.mark.parametrize("setting", ["gain", "power"])
def test_a_container_that_computes_more_is_no_chain(setting):
    model, x = Gained(*make_foreign("fast-kan").layers), inside()
    assert stages_of(model)

    setattr(model, setting, 2)

    assert stages_of(model) is None
    assert_same(jet(model, x), nested(model, x))
    setattr(model, setting, 1)
    assert stages_of(model)


def test_layers_that_compute_more_have_no_closed_form():
    class Biased(OldEfficientKANLayer):
        def __init__(self, *args):
            super().__init__(*args)
            self.bias = nn.Parameter(torch.zeros(()))  # as yet without effect

        def forward(self, x):
            return super().forward(x) + self.bias

    model, x = Biased(2, 3).double(), inside()

    assert find_stages(model) is None
    assert_same(jet(model, x), nested(model, x))


class Sines(Formula):
    def __init__(self, inputs, outputs):
        super().__init__(None, sine_weights=(outputs, inputs, 3))

    def forward(self, x):
        angles = x.unsqueeze(-1) * torch.arange(1, 4)
        return torch.einsum("nik,oik->no", angles.sin(), self.sine_weights)


@pytest.mark.parametrize("wrong", [None, *range(6)])
def test_wrong_derivatives_of_a_users_kind_are_not_used(wrong):
    """Even if other derivatives were right when the class was registered before."""

    def derivatives(layer, x, highest):
        sines = [harmonics[..., 3:] for harmonics in functions.harmonic_derivatives(3, x, highest)]
        if wrong is not None and wrong <= highest:
            sines[wrong] = 1.001 * sines[wrong]
        return sines

    model, x = Loop(Sines(2, 3), Sines(3, 1)).double(), inside(40)
    assert stages_of(model) is None

    register_kan_layer("sines", matches=Sines, coefficients=("sine_weights", "o i k"), derivatives=derivatives)

    assert (stages_of(model) is None) == (wrong is not None)
    assert_same(jet(model, x), nested(model, x))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x


def test_looking_for_a_closed_form_leaves_the_model_unchanged():
    model = Loop(FastKANLayer(2, 3), FastKANLayer(3, 1)).train()
    model.layers.append(Counter())
    generator_state, before = torch.get_rng_state(), state(model)

    assert stages_of(model)

    assert model.training
    assert_equal(torch.get_rng_state(), generator_state)
    assert not any(module._forward_hooks for module in model.modules())
    assert_equal(state(model), before)


LEARNED = {
    "centers": (lambda: FastKANLayer(2, 3, use_layernorm=False), "rbf.grid"),
    "knots": (lambda: OldEfficientKANLayer(2, 3), "grid"),
    "activation": (lambda: OldEfficientKANLayer(2, 3, base_activation=nn.PReLU), "base_activation.weight"),
}


@pytest.mark.parametrize("name", LEARNED)
def test_centers_knots_and_activations_that_are_trained_have_gradients(name):
    make, path = LEARNED[name]
    layer, x = make().double(), inside(40)
    jet(layer, x)  # looks at the layer before anything is trained
    learned = operator.attrgetter(path)(layer).requires_grad_()

    for derivative, expected in zip(jet(layer, x), nested(layer, x), strict=True):
        (expected_gradient,) = loss_gradients([expected], learned)
        (gradient,) = loss_gradients([derivative], learned)
        largest = max(1e-6, expected_gradient.abs().max().item())
        assert_close(gradient, expected_gradient, rtol=0, atol=1e-9 * largest)
