# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Each module with matrices that is no KAN layer gets a line: which tensor, what it is not, what to do."""

import warnings

import pytest
import torch
from orders import Formula, Layer, skan
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, register_kan_layer
from peft_lotra.kan import KANLinear


def powers(x, count=4):
    return torch.tanh(x)[..., None] ** torch.arange(count)


def experts(m, x):
    gates = (x @ m.gates.T).softmax(-1)
    return torch.einsum("bik,oike,be->bo", powers(x), m.experts, gates)


def complex_waves(m, x):
    waves = torch.exp(1j * x[..., None] * torch.arange(1, 4))
    return torch.einsum("bik,iok->bo", waves, m.waves).real


class Spectral(nn.Module):
    """A convolution in the frequency domain, as in a Fourier neural operator."""

    def __init__(self, channels=3, modes=4):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat))

    def forward(self, x):
        spectrum = torch.fft.rfft(x)[..., : self.weights.shape[-1]]
        return torch.fft.irfft(torch.einsum("bik,iok->bok", spectrum, self.weights), n=x.shape[-1])


class Raises(Layer):
    def forward(self, x):
        return torch.zeros(3, 4) @ torch.zeros(5, 6)


class OnlySquares(Layer):
    def forward(self, x):
        raise ValueError("Give a graph.\nIts edges are missing.")


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.layer = nn.Parameter(torch.randn(3, 3)), KANLinear(3, 3)

    def forward(self, x):
        return self.layer(x @ self.mixer)


def complex_parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.cfloat))


REASONS = {
    "experts": (
        lambda: Formula(experts, experts=(5, 3, 4, 2), gates=(2, 3)),
        "`experts`, `gates` are not coefficients of a sum",
    ),
    "complex": (lambda: Formula(complex_waves, waves=complex_parameter(3, 4, 3)), "`waves` is complex"),
    "spectral": (Spectral, "`weights` is complex"),
    "an error of torch": (lambda: Raises(3, 4), "the layer raised RuntimeError."),
    "an error of the layer": (lambda: OnlySquares(3, 4), "the layer raised ValueError: Give a graph.."),
    "no values": (lambda: Layer(3, 9).to("meta"), "`A` has no values"),
    "a KAN layer inside": (Deep, "its part `layer` is a KAN layer."),
    "a matrix": (lambda: Formula(lambda m, x: x @ m.w, w=(3, 4)), "`w` are not coefficients of a sum"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_module_with_matrices_gets_one_sentence(name):
    make, words = REASONS[name]
    model = nn.ModuleList([make()])

    rows = find_kan_layers(model)

    (module,) = rows.unrecognized
    assert module.reason.startswith(words)
    assert "\n" not in module.reason
    assert f"0 ({module.cls}) is not recognized: {module.reason}" in str(rows)
    assert "take plain LoRA" in str(rows)


def test_modules_of_torch_and_small_parameters_get_no_line():
    model = nn.ModuleList([nn.Linear(3, 4), nn.Conv1d(3, 4, 3), nn.Embedding(5, 4), nn.LayerNorm((3, 4))])
    model.append(Formula(lambda m, x: x * m.scale, scale=(3,)))

    assert not find_kan_layers(model).unrecognized


def test_spectral_convolutions_are_no_reason_for_a_warning():
    model = nn.ModuleList([KANLinear(3, 4), Spectral()])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(model, LoTRAConfig(r=1))


@pytest.mark.parametrize("sizes", [(3, 4), (5, 5), (1, 1), (4, 1), (7, 2), (128, 80)])
def test_a_matrix_with_a_nonlinear_parameter_of_each_edge_is_named_with_its_registration(sizes):
    base = nn.Sequential(skan(*sizes))
    x = torch.rand(6, sizes[0])

    (module,) = find_kan_layers(base).unrecognized
    register_kan_layer("skan", matches=Formula, coefficients=("weight", "o i"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter is larger than a single edge
        model = get_peft_model(base, LoTRAConfig(r=1, init_weights=False)).eval()

    assert 'register it with coefficients=("weight", "o i").' in module.reason
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_what_was_learned_of_a_class_with_the_arguments_of_a_call_is_not_learned_again():
    class Graph(Layer):
        runs = 0

        def forward(self, x, edges):
            Graph.runs += 1
            return super().forward(x) * edges.mean()

    class Model(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = nn.ModuleList([Graph(4, 4) for _ in range(count)])

        def forward(self, x, edges):
            for layer in self.layers:
                x = layer(x, edges)
            return x

    def count_runs(count):
        before = Graph.runs
        assert find_kan_layers(Model(count), torch.rand(5, 4), torch.ones(3)).unrecognized[0].registration
        return Graph.runs - before

    first = count_runs(1)

    assert first > 2
    assert count_runs(1) == 1  # in the run of the model
    assert count_runs(20) == 20
