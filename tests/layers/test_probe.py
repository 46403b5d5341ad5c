# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The probe of axes and linearity: what it finds, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from helpers import adapt, inputs, relative
from orders import Layer, OtherCheby
from peft import PeftModel
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import find_kan_layers, register_kan_layer
from peft_lotra.layers.probe import CURVATURE, Probe
from peft_lotra.layers.registry import KANLayerSpec, get_kan_spec


def described(layer, pattern, **changes):
    spec = KANLayerSpec("mine", type(layer), ("A", pattern), **changes)
    return spec, spec.locate_as_described(layer)


def verdict(layer, pattern):
    _, tensor = described(layer, pattern)
    return Probe(layer, {}).axes(tensor)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 4), (5, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_known_families_are_as_described_and_linear(family, sizes):
    layer = FAMILIES[family](*sizes)
    spec = get_kan_spec(layer)
    tensor, probe = spec.locate_as_described(layer), Probe(layer, spec.read_grid(layer))
    assert probe.axes(tensor).is_verified
    assert probe.curvature(tensor) < CURVATURE / 10
    assert spec.locate(layer) == tensor  # nothing is read in another order
    spec.check("kan", layer, tensor)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 4), (2, 2), (4, 3), (1, 3), (3, 1)])
def test_a_chebykan_of_the_other_order_is_read_in_its_order(sizes):
    i, o = sizes
    model = as_model(OtherCheby(i, o))
    (found,) = find_kan_layers(model)
    assert (found.family, found.shape) == ("cheby-kan", (o, i, 5))
    tensor = get_kan_spec(model.kan).locate(model.kan)
    assert torch.equal(tensor.read(model.kan), model.kan.cheby_coeffs)
    adapted = adapt(model)
    assert adapted.base_model.model.kan.out_features == o
    x = inputs(6, in_features=i)
    y = adapted(x)
    assert relative(adapted.merge_and_unload()(x), y) < 1e-5


@pytest.mark.parametrize("order", ["o i k", "i o k", "o k i", "k i o", "i k o", "k o i"])
def test_only_the_order_in_which_it_is_stored_is_verified(order):
    layer = Layer(5, 5, 5, order)  # where no size gives it away
    verified = [
        other for other in ("o i k", "i o k", "o k i", "k i o", "i k o", "k o i") if verdict(layer, other).is_verified
    ]
    assert verified == [order]
    spec, _ = described(layer, order.translate(str.maketrans("oi", "io")))
    assert spec.locate(layer) == described(layer, order)[1]


NORMS = {
    "a layer norm of the inputs": {"before": nn.LayerNorm(5)},
    "a layer norm of the outputs": {"after": nn.LayerNorm(5)},
    "an activation": {"after": nn.SiLU()},
    "a batch norm": {"before": nn.BatchNorm1d(5), "after": nn.BatchNorm1d(5)},
    "both": {"before": nn.Sequential(nn.LayerNorm(5), nn.Tanh()), "after": nn.Sequential(nn.LayerNorm(5), nn.SiLU())},
}


@pytest.mark.parametrize("norms", NORMS)
def test_normalizations_and_activations_do_not_hide_the_order(norms):
    layer = Layer(5, 5, 5, **NORMS[norms])
    assert verdict(layer, "o i k").is_verified and not verdict(layer, "i o k").is_verified
    assert described(layer, "i o k")[0].locate(layer) == described(layer, "o i k")[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_any_precision(dtype):
    layer = OtherCheby(4, 4).to(dtype)
    assert get_kan_spec(layer).locate(layer).parameters["cheby_coeffs"].pattern == "o i k"


def test_a_pattern_that_the_gradients_contradict_is_refused_by_name():
    model = nn.Sequential(nn.Tanh(), Layer(5, 5, 5, "o k i"))
    register_kan_layer("mine", matches=Layer, coefficients=("A", "o i k"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        adapt(model)
    for part in ("`1` (Layer, of the KAN family 'mine')", "`A` (5, 5, 5)", "'o i k'", "'o k i' would fit"):
        assert part in str(error.value)
    assert type(model[1]) is Layer and all(torch.equal(before[name], v) for name, v in model.state_dict().items())


def test_flattened_axes_in_the_other_order_are_refused():
    class Flat(Layer):
        def forward(self, x):
            powers = x[:, None, :] ** torch.arange(4.0)[:, None]
            return powers.flatten(1) @ self.A.T

    layer = Flat(4, 3, 4)
    layer.A = nn.Parameter(torch.randn(3, 16))
    register_kan_layer("mine", matches=Flat, coefficients=("A", "o (i k)"), axes={"i": 4})
    with pytest.raises(ValueError, match=r"'o \(i k\)'.* 'o \(k i\)' would fit"):
        adapt(as_model(layer))
    register_kan_layer("mine", matches=Flat, coefficients=("A", "o (k i)"), axes={"i": 4})
    adapt(as_model(layer))


class Wavelets(nn.Module):
    """Wav-KAN: y[o] = sum_i w[o,i] psi((x[i] - t[o,i]) / s[o,i]), with a batch norm."""

    def __init__(self, i=3, o=4):
        super().__init__()
        self.scale, self.translation = nn.Parameter(torch.ones(o, i)), nn.Parameter(torch.zeros(o, i))
        self.wavelet_weights = nn.Parameter(torch.randn(o, i))
        self.bn = nn.BatchNorm1d(o)

    def forward(self, x):
        u = (x[:, None] - self.translation) / self.scale
        return self.bn((self.wavelet_weights * (1 - u**2) * torch.exp(-(u**2) / 2)).sum(-1))


def register_wavelets(**changes):
    parts = [(name, "o i") for name in ("scale", "translation", "wavelet_weights")]
    register_kan_layer("wavelets", matches=Wavelets, coefficients=parts, **changes)


def test_a_layer_that_is_not_linear_is_refused_by_name():
    register_wavelets()
    with pytest.raises(ValueError) as error:
        adapt(as_model(Wavelets()))
    for part in (
        "`kan` (Wavelets, of the KAN family 'wavelets')",
        "not linear in `scale`, `translation`",
        "linear=False",
    ):
        assert part in str(error.value)


class Unused(Layer):
    def __init__(self, *lengths):
        super().__init__(*lengths)
        self.B = nn.Parameter(torch.randn_like(self.A))
        self.bias = nn.Parameter(torch.zeros(lengths[1]))

    def forward(self, x):
        return super().forward(x) + self.bias


@pytest.mark.parametrize("coefficients", [[("A", "o i k"), ("B", "o i k")], [("B", "o i k")]])
@pytest.mark.parametrize("trained", [True, False])
def test_coefficients_that_the_output_does_not_depend_on_are_refused_by_name(coefficients, trained):
    register_kan_layer("mine", matches=Unused, coefficients=coefficients)
    layer = Unused(4, 3, 4).requires_grad_(trained)
    before = copy.deepcopy(layer.state_dict())
    model = as_model(layer)
    with pytest.raises(ValueError, match=r"`kan` \(Unused, of the KAN family 'mine'\) does not use `B`: its output"):
        adapt(model)
    assert model.kan is layer and all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_described_as_not_linear_everything_but_the_fast_path_works(tmp_path):
    register_wavelets(linear=False, basis=lambda m, x: x[..., None].expand(-1, -1, 3))
    torch.manual_seed(0)
    base = as_model(Wavelets()).eval()
    fresh, x = copy.deepcopy(base), inputs(6)
    model = adapt(base, random=False)
    assert torch.equal(model(x), fresh(x))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    y = model(x)
    assert relative(y, fresh(x)) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path)(x), y, atol=1e-6)
    assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-5)


class Convolution(nn.Module):
    """Powers of x, degree-major, in one convolution, with groups in a list."""

    def __init__(self, i=6, o=8, k=3, groups=2):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i // groups * k, o // groups, 3, bias=False) for _ in range(groups))
        self.k, self.in_channels = k, i

    def forward(self, x):
        blocks = x.chunk(len(self.convs), dim=1)
        return torch.cat(
            [c(torch.cat([b**j for j in range(self.k)], 1)) for c, b in zip(self.convs, blocks, strict=True)], 1
        )


@pytest.mark.parametrize("pattern, fits", [("o (k i) ...", True), ("o (i k) ...", False)])
def test_convolutions_with_groups(pattern, fits):
    layer = Convolution()
    spec = KANLayerSpec("mine", Convolution, ("convs.*.weight", pattern), axes={"k": 3})
    tensor = spec.locate(layer)
    assert tensor.shape == (8, 3, 3, 9) and Probe(layer, {}).axes(tensor).is_verified == fits
    if fits:
        spec.check("conv", layer, tensor)
    else:
        with pytest.raises(ValueError, match=r"'o \(k i\) \.\.\.' would fit"):
            spec.check("conv", layer, tensor)


class Graph(Layer):
    def forward(self, x, edges):
        return super().forward(x) + edges.sum()


class Windows(Layer):
    def forward(self, x):
        return {"y": super().forward(x)}


class Fails(Layer):
    def forward(self, x):
        raise AssertionError("rows")


class NoGradient(Layer):
    def forward(self, x):
        return super().forward(x).detach()


class NaNs(Layer):
    def forward(self, x):
        return super().forward(x) * torch.nan


@pytest.mark.parametrize("kind", [Graph, Windows, Fails, NoGradient, NaNs])
def test_layers_that_cannot_be_called_are_not_verified_and_attached(kind):
    layer = kind(5, 5, 5)
    found = verdict(layer, "o i k")
    assert found[:2] == (None, None) and str(found).startswith("not verified: ") and found.reason
    register_kan_layer("mine", matches=kind, coefficients=("A", "o i k"))
    adapted = adapt(as_model(layer))
    assert adapted.base_model.model.kan.lotra_tensor.parameters["A"].pattern == "o i k"


@pytest.mark.parametrize("change", [lambda m: m.to("meta"), lambda m: nn.utils.parametrizations.weight_norm(m, "A")])
def test_tensors_without_values_and_computed_ones_are_not_verified(change):
    layer = change(Layer(5, 5, 5))
    assert verdict(layer, "o i k")[:2] == (None, None)


def test_no_large_input_is_made():
    layer = nn.Module()
    layer.A = nn.Parameter(torch.zeros(1).expand(2, 3, 3000, 3000))  # of a single number
    _, tensor = described(layer, "o i ...")
    assert "would be large" in Probe(layer, {}).axes(tensor).reason


def test_the_layer_is_left_as_it_was():
    class Noisy(Layer):
        def forward(self, x):
            self.last = x
            self.calls = getattr(self, "calls", 0) + 1
            return nn.functional.dropout(super().forward(x), training=self.training) + 0 * torch.rand(())

    norms = {"before": nn.BatchNorm1d(5), "after": nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5))}
    layer = Noisy(5, 5, 5, **norms).train()
    layer.before.eval()
    layer.A.requires_grad_(False)
    layer.before.weight.grad = torch.ones(5)
    ran = []
    layer.register_forward_hook(lambda *args: ran.append(1))
    layer.after.register_forward_pre_hook(lambda *args: ran.append(1))

    def state():
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for m in layer.modules()
        ]
        flags = [(p.requires_grad, p.grad is None, p._version) for p in layer.parameters()]
        return modules, flags, [b._version for b in layer.buffers()], random.getstate(), torch.get_rng_state().tolist()

    before, tensors = state(), copy.deepcopy(layer.state_dict())
    register_kan_layer("mine", matches=Noisy, coefficients=("A", "i o k"), linear=True)
    spec = get_kan_spec(layer)
    tensor = spec.locate(layer)
    assert tensor.parameters["A"].pattern == "o i k"
    spec.check("kan", layer, tensor)
    assert state() == before and not ran
    assert all(torch.equal(value, tensors[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_in_any_context(context):
    layer = OtherCheby(4, 4)
    with context():
        assert get_kan_spec(layer).locate(layer).parameters["cheby_coeffs"].pattern == "o i k"
