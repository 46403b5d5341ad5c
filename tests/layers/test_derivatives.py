# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Closed forms of jets of other libraries' layers and networks."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from foreign import Loop, efficient, make_foreign
from helpers import adapt
from jet_helpers import assert_same, nested
from orders import Formula
from stand_ins import FAMILIES, FasterKANLayer, FastKANLayer, OldEfficientKANLayer, as_model
from torch import Tensor, nn

from peft_lotra import register_kan_layer
from peft_lotra.derivatives import bases as functions
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.derivatives.torch_fallback import ExactNorms
from peft_lotra.kan import KAN, jet, laplacian
from peft_lotra.layers.derivatives import find_stages


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:Adapters have more", "ignore:std")

CLOSED = "own efficient-kan efficient-kan-no-scaler efficient-kan-old fast-kan faster-kan cheby-kan fourier-kan"
CLOSED = [*CLOSED.split(), "physicsnemo", "pina"]


def inside(rows: int = 6, size: int = 2) -> Tensor:
    return torch.rand(rows, size, dtype=torch.float64) * 0.9 + 0.05


def check(model: nn.Module, x: Tensor) -> None:
    """The jet and its gradients, those of the parameters and of x."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    x = x.clone().requires_grad_()
    assert stages_of(model)
    found = jet(model, x)
    with ExactNorms():
        expected = nested(model, x)
        assert_same(found, expected, 1e-9)
        gradients = [
            torch.autograd.grad(
                sum(part.square().sum() for part in parts), parameters, allow_unused=True, materialize_grads=True
            )
            for parts in (found, expected)
        ]
    largest = max(gradient.abs().max() for gradient in gradients[1])
    for name, a, e in zip(names, *gradients, strict=True):
        assert (a - e).abs().max() <= 1e-9 * largest, name
    assert_same((laplacian(model, x),), (expected[2].sum(0),), 1e-9)


NETWORKS = ["efficient-kan", "fast-kan", "cheby-kan", "fourier-kan", "pina", "tanh", "mlp"]
MODELS = {
    **{f"layer of {name}": lambda name=name: as_model(FAMILIES[name](3, 2)).double() for name in CLOSED},
    **{f"network of {name}": lambda name=name: make_foreign(name) for name in NETWORKS},
    "parts among ours": lambda: nn.Sequential(
        KAN([2, 3]), nn.LayerNorm(3), FasterKANLayer(3, 2), nn.SiLU(), nn.Linear(2, 1)
    ).double(),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_closed_forms(name, adapted):
    torch.manual_seed(0)
    model, size = MODELS[name](), 3 if name.startswith("layer") else 2
    model = adapt(model) if adapted and "mlp" not in name else model
    check(model, inside(40, size))
    stages = stages_of(model)
    by_rows = torch.func.vmap(lambda row: jet(model, row[None])[2])(inside(3, size))
    assert stages and by_rows.shape == (3, size, 1, 2 if size == 3 else 1)


def test_grids_that_move():
    """Uneven knots, and back to even ones."""
    model = efficient().float()
    x = inside(40).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [type(stage.formula.basis).__name__ for stage in stages_of(model)] == ["UniformGrid"] * 2
    for layer in model.layers:
        layer.grid += 0.1 * torch.rand(layer.grid.shape).sort(-1).values
    assert [type(stage.formula.basis).__name__ for stage in stages_of(model)] == ["FunctionBasis"] * 2
    assert_same(jet(model, x), nested(model, x), 1e-4)
    check(model.double(), inside(40))
    model.float().load_state_dict(before)
    assert_same(jet(model, x), nested(model, x), 1e-4)


class Gained(Loop):
    gain = power = 1

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gain == self.power == 1 else self.gain * y**self.power


def test_containers_that_compute_more_are_no_chain():
    model, x = Gained(*make_foreign("fast-kan").layers), inside()
    assert stages_of(model)
    for name in ("gain", "power"):
        setattr(model, name, 2)
        assert stages_of(model) is None
        assert_same(jet(model, x), nested(model, x))
        setattr(model, name, 1)
        assert stages_of(model)
    model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(jet(model, x), nested(model, x))
    assert stages_of(nn.Sequential(*model.layers)) is None


def test_layers_that_compute_more_have_no_closed_form():
    class Biased(OldEfficientKANLayer):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.bias = nn.Parameter(torch.zeros(()))  # as yet without effect

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.bias

    model, x = Biased(2, 3).double(), inside()
    assert find_stages(model) is None
    assert_same(jet(model, x), nested(model, x))


@pytest.mark.parametrize("wrong", [None, *range(6)])
def test_wrong_derivatives_of_a_users_family_are_not_used(wrong):
    class Sines(Formula):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(None, sine_weights=(outputs, inputs, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nik,oik->no", (x.unsqueeze(-1) * torch.arange(1, 4)).sin(), self.sine_weights)

    def derivatives(layer: nn.Module, x: Tensor, highest: int) -> list[Tensor]:
        found = [part[..., 3:] for part in functions.harmonic_derivatives(3, x, highest)]
        return [1.001 * part if d == wrong else part for d, part in enumerate(found)]

    model, x = Loop(Sines(2, 3), Sines(3, 1)).double(), inside(40)
    assert stages_of(model) is None
    register_kan_layer("sines", matches=Sines, coefficients=("sine_weights", "o i k"), derivatives=derivatives)
    assert (stages_of(model) is None) == (wrong is not None)
    assert_same(jet(model, x), nested(model, x))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x


def test_looking_leaves_no_trace():
    model = Loop(FastKANLayer(2, 3), FastKANLayer(3, 1)).train()
    model.layers.append(Counter())
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    assert stages_of(model) and model.training
    assert torch.equal(before, torch.get_rng_state())
    assert not any(part._forward_hooks for part in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["centers", "knots", "activation"])
def test_functions_that_are_learned(name):
    """Centers, knots and activations that are trained have the gradients of the layer's own forward pass."""
    layer, path = {
        "centers": (FastKANLayer(2, 3, use_layernorm=False), "rbf.grid"),
        "knots": (OldEfficientKANLayer(2, 3), "grid"),
        "activation": (OldEfficientKANLayer(2, 3, base_activation=nn.PReLU), "base_activation.weight"),
    }[name]
    layer = layer.double()
    x = inside(40)
    jet(layer, x)  # which looks at the layer before anything is trained
    learned = operator.attrgetter(path)(layer).requires_grad_()
    for found, expected in zip(jet(layer, x), nested(layer, x), strict=True):
        of = [
            torch.autograd.grad((f * f).sum(), learned, retain_graph=True, allow_unused=True)
            for f in (found, expected)
        ]
        (a,), (b,) = ([0 * learned if g is None else g for g in grads] for grads in of)
        assert (a - b).abs().max() <= 1e-9 * max(1e-6, b.abs().max())
