# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers that do more than the class they are derived from are run themselves, without the formula of that class."""

import copy

import pytest
import torch
from helpers import assert_equal
from jet_helpers import assert_same, nested
from peft import get_peft_model
from stand_ins import ChebyKANLayer, FastKANLayer, OldEfficientKANLayer
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, find_kan_layers
from peft_lotra.kan import KANLinear, jet


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:Most inputs of")

CHANGES = {
    "clamps inputs at 6": lambda call, x: call(x.clamp(-6, 6)),
    "clamps inputs at 100": lambda call, x: call(x.clamp(-100, 100)),
    "clamps inputs at -6": lambda call, x: call(x.clamp(min=-6)),
    "clamps outputs": lambda call, x: call(x).clamp(-20, 20),
    "scales gradients": lambda call, x: call(2 * x - x.detach()),
    "clamps inputs at a million": lambda call, x: call(x.clamp(-1e6, 1e6)),
    "masks rows of zeros": lambda call, x: call(x) * (x != 0).any(-1, keepdim=True),
    "replaces NaN in inputs": lambda call, x: call(x.nan_to_num()),
    "replaces NaN in outputs": lambda call, x: call(x).nan_to_num(),
    "doubles a single row": lambda call, x: call(x) * (2 if len(x) == 1 else 1),
}
CLASSES = {"own": KANLinear, "efficient-kan": OldEfficientKANLayer, "fast-kan": FastKANLayer}
POINTS = torch.tensor(
    [
        [0.3, -0.5, 0.9],
        [2.5, -2.5, 4.0],
        [-30.0, 30.0, 20.0],
        [1000.0, -1000.0, 500.0],
        [3e6, -2e6, 5e6],
        [0.0, 0.0, 0.0],
        [torch.nan, 0.1, 0.2],
    ]
)


def changed(cls, change):
    return type("Changed", (cls,), {"forward": lambda self, x: change(lambda z: cls.forward(self, z), x)})


def make_layer(cls, change=None):
    torch.manual_seed(0)
    return (cls if change is None else changed(cls, change))(3, 4)


def adapt(layer):
    """Returns a network with an adapter that is zero, after its first forward pass."""
    model = get_peft_model(nn.Sequential(layer), LoTRAConfig(r=2)).eval()
    model(POINTS)
    return model


def assert_same_function(model, layer):
    """Compares values and slopes, those of each row relative to their size."""
    results = []
    for function in (model, layer):
        x = POINTS.clone().requires_grad_()
        y = function(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, slope, function(POINTS[:1])))
    for result, expected in zip(*results, strict=True):
        sizes = expected.nan_to_num().abs().amax(1, keepdim=True).clamp(min=1e-3)
        assert_close(result / sizes, expected / sizes, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_zero_adapter_changes_no_value_and_no_slope_of_a_layer_that(name, change):
    layer = make_layer(CLASSES[name], CHANGES[change])

    model = adapt(copy.deepcopy(layer))

    assert_same_function(model, layer)


@pytest.mark.parametrize("cls", [OldEfficientKANLayer, FastKANLayer, ChebyKANLayer])
def test_the_jet_of_a_layer_that_clamps_is_its_own_far_outside_of_the_grid(cls):
    layer = changed(cls, CHANGES["clamps inputs at 6"])(3, 4, *([4] if cls is ChebyKANLayer else [])).double()

    result = jet(layer, POINTS[:3].double())

    assert_same(result, nested(layer, POINTS[:3].double()))


def test_the_jet_of_a_layer_whose_forward_was_replaced_is_that_of_the_new_one():
    layer = make_layer(KANLinear).double()
    layer.forward = lambda x: KANLinear.forward(layer, x.clamp(-6, 6))

    result = jet(layer, POINTS[:4].double())

    assert_same(result, nested(layer, POINTS[:4].double()))


class Gained(OldEfficientKANLayer):
    """Adds inputs by a factor, and multiplies outputs by a mask, both without effect in a new layer."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.ones(out_features))

    def forward(self, x):
        return self.mask * super().forward(x) + self.gain * x.sum(-1, keepdim=True)


class Switched(OldEfficientKANLayer):
    """Multiplies its output by settings, which are one in a new layer."""

    gain = 1.0
    gains = (1.0, 1.0)

    def forward(self, x):
        return self.gain * self.gains[0] * super().forward(x)


class Swish(nn.Module):
    beta = 1.0

    def forward(self, x):
        return nn.functional.silu(self.beta * x) / self.beta


class WithSwish(OldEfficientKANLayer):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, base_activation=Swish)


LATER = {
    "a parameter of a subclass": (Gained, lambda m: m.gain.data.fill_(2.0)),
    "a buffer": (Gained, lambda m: m.mask[0].zero_()),
    "a setting": (Switched, lambda m: setattr(m, "gain", 2.0)),
    "a tuple of settings": (Switched, lambda m: setattr(m, "gains", (2.0, 1.0))),
    "a setting of the activation": (WithSwish, lambda m: setattr(m.base_activation, "beta", 2.0)),
    "the activation": (FastKANLayer, lambda m: setattr(m, "base_activation", nn.ReLU())),
    "an activation near silu": (FastKANLayer, lambda m: setattr(m, "base_activation", nn.GELU())),
    "the forward": (KANLinear, lambda m: setattr(m, "forward", lambda x, forward=m.forward: 2 * forward(x))),
    "a hook on a part": (FastKANLayer, lambda m: m.base_linear.register_forward_hook(lambda _, args, y: 2 * y)),
}


@pytest.mark.parametrize("name", LATER)
def test_what_changes_after_the_first_pass_counts(name):
    cls, change = LATER[name]
    layer = make_layer(cls)
    model = adapt(copy.deepcopy(layer))

    change(layer)
    change(model.base_model.model[0].base_layer)

    assert_same_function(model, layer)


class Recording(OldEfficientKANLayer):
    """Keeps a penalty of its last outputs, and counts the rows it has seen."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.penalty = 0.0
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        y = super().forward(x)
        self.penalty = y.abs().mean()
        self.rows = self.rows + len(x)
        return y


def test_what_a_layer_keeps_of_a_pass_is_that_of_the_adapted_pass():
    layer = make_layer(Recording)
    model = get_peft_model(nn.Sequential(layer), LoTRAConfig(r=2, init_weights=False))
    x = POINTS[:2]

    assert layer.penalty == 0.0
    y = model(x)

    assert_equal(layer.penalty, y.abs().mean())
    assert layer.rows == len(x)


class Initialized(OldEfficientKANLayer):
    """Scales its coefficients in place by its first inputs."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("is_ready", torch.tensor(False))

    def forward(self, x):
        if not self.is_ready:
            self.spline_weight.data /= 1 + x.std()
            self.is_ready.fill_(True)
        return super().forward(x)


@pytest.mark.parametrize("read", [find_kan_layers, lambda model: get_peft_model(model, LoTRAConfig(r=2))])
def test_the_first_input_of_a_layer_is_the_users(read):
    layer = make_layer(Initialized)
    expected = copy.deepcopy(layer.state_dict())

    read(nn.Sequential(layer))

    for name, value in expected.items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_compiled_code_notices_that_the_activation_is_exchanged():
    model = get_peft_model(nn.Sequential(make_layer(OldEfficientKANLayer)), LoTRAConfig(r=2)).eval()
    compiled = torch.compile(model, backend="eager")
    compiled(POINTS)
    model(POINTS)

    model.base_model.model[0].base_layer.base_activation = nn.Tanh()

    # before the eager pass, which compares the formula again
    assert_close(compiled(POINTS), model(POINTS), equal_nan=True)
