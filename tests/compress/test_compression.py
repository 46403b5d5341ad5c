# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative
from peft import get_peft_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, register_kan_layer, slim, to_dense
from peft_lotra.compress.features import Features
from peft_lotra.compress.updates import read_coefficients
from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKANLinear
from peft_lotra.layers.registry import get_kan_spec
from peft_lotra.layers.slim import SlimLayer
from peft_lotra.tucker import reconstruct


RANKS = (5, 6, 3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def base(family):
    return as_model(FAMILIES[family](12, 10)).eval()


def points(rows=6):
    return torch.rand(rows, 12) * 1.8 - 0.9


def effective(layer):
    tensor, scale = read_coefficients("", layer)
    return tensor if scale is None else tensor * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, x = base(family), points()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(x)
    small = slim(model, RANKS)
    layer = small.kan
    assert isinstance(layer, SlimKANLinear if family == "own" else SlimLayer) and layer.ranks == RANKS
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert not any(name.endswith(("coef", "spline_weight", "coeffs", "scaler")) for name in small.state_dict())

    # the error that is reported is that of the tensor which the factors make
    before, made = effective(model.kan), reconstruct(*layer.components).double()
    error = ((before - made).norm() / before.norm()).item()
    assert small.slim_report.errors["kan"] == pytest.approx(error, rel=1e-6)

    # as in the original class, and the model that was compressed is as it was
    dense = small.to_dense()
    assert type(dense.kan) is type(model.kan) and dense.state_dict().keys() == state.keys()
    assert relative(dense(x), small(x)) < 1e-5
    assert [p.requires_grad for p in dense.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(model(x), y) and all(torch.equal(model.state_dict()[n], t) for n, t in state.items())

    # it trains on
    optimizer = torch.optim.Adam([p for p in small.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(40):
        losses.append((small(x) - y.detach()).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert relative(small.to_dense()(x), small(x)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_all_the_energy_changes_nothing(family):
    """At full ranks, of a tensor that has low ranks, the function is kept."""
    model, x = base(family), points()
    model = slim(model, (3, 3, 2)).to_dense()
    small = slim(model, energy=1 - 1e-9)
    assert all(rank <= most for rank, most in zip(small.slim_report.ranks["kan"], (3, 3, 2), strict=True))
    assert relative(small(x), model(x)) < 1e-4


@pytest.mark.parametrize("family", ["own", "pykan", "fast-kan", "efficient-kan", "inkan", "fourier-kan"])
def test_inputs_count_what_the_factors_miss_of_the_outputs(family):
    model = base(family)
    x = points(200)
    x[:, 3:] = x[:, :3].repeat(1, 3)  # there is less to keep than the coefficients have
    small = slim(model, energy=0.99, inputs=x)
    error = small.slim_report.output_errors["kan"]
    assert error <= 0.1 + 1e-3 and f"of outputs {error:.2%}" in str(small.slim_report)
    with torch.no_grad():  # biases apart, which stay
        zero = model(x) - small(x)
        y = Features(model.kan, get_kan_spec(model.kan), x).outputs(effective(model.kan))
        measured = zero.norm() / (y - y.mean(0)).norm()
    assert measured.item() == pytest.approx(error, rel=1e-3, abs=1e-5)
    assert relative(small(x), model(x)) < relative(slim(model, small.slim_report.ranks)(x), model(x))
    assert slim(model, budget=150, inputs=x).slim_report.parameters[1] <= 150


@torch.no_grad()
def test_reported_errors_are_those_that_are_measured():
    model, x = KAN([12, 10, 6]), points(300)
    small = slim(model, energy=0.95, inputs=x)
    h = x
    for name, layer, little in zip(("layers.0", "layers.1"), model.layers, small.layers, strict=True):
        y, made = layer(h), little(h)
        error = ((y - made).norm() / (y - y.mean(0)).norm()).item()
        assert small.slim_report.output_errors[name] == pytest.approx(error, rel=1e-4)
        error = ((effective(layer) - effective(little.to_dense())).norm() / effective(layer).norm()).item()
        assert small.slim_report.errors[name] == pytest.approx(error, rel=1e-5)
        h = y
    error = ((h - small(x)).norm() / (h - h.mean(0)).norm()).item()
    assert small.slim_report.model_error == pytest.approx(error, rel=1e-4) and error**2 <= 0.05
    assert f"error of the model's outputs {error:.2%}" in str(small.slim_report)


def test_what_later_layers_do_not_use_is_not_kept():
    model, x = KAN([12, 10, 6]).requires_grad_(False), points(300)
    model.layers[1].spline_weight[:, 3:] = 0
    model.layers[1].base_weight[:, 3:] = 0
    report = slim(model, {"layers.0": (3, 12, 9)}, inputs=x).slim_report
    assert report.output_errors["layers.0"] > 0.3 and report.model_error < 0.1
    assert not any(p.requires_grad for p in model.parameters())


def test_inputs_need_a_model_that_returns_a_tensor():
    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.kan, self.wrap = KAN([12, 10]), wrap

        def forward(self, x):
            return self.wrap(self.kan(x))

    for wrap in (lambda y: (y, None), lambda y: {"logits": y}):
        assert slim(Wrapped(wrap), energy=0.9, inputs=points(50)).slim_report.model_error ** 2 <= 0.1
    with pytest.raises(TypeError, match="With `inputs`, the model must return a tensor .* but it returned int"):
        slim(Wrapped(len), energy=0.9, inputs=points(50))


def test_inputs_reach_every_layer_as_in_evaluation():
    model = KAN([20, 16, 8], norm="batch")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = slim(model, (4, 4, 3), inputs=torch.randn(5, 7, 20))
    assert list(small.slim_report.output_errors) == ["layers.0", "layers.2"] and small.training
    for name, tensor in small.state_dict().items():
        assert name not in before or torch.equal(tensor, before[name]), name
    model.layers.append(nn.Identity())
    model.unused = KAN([3, 2])
    with pytest.raises(ValueError, match=r"None of `inputs` reaches \['unused\.layers\.0'\]"):
        slim(model, (2, 2, 2), inputs=torch.randn(5, 20))


def test_energy_and_budget():
    model = KAN([20, 16, 8])
    kept = slim(model, energy=0.5)
    assert all(error <= 0.5**0.5 + 1e-6 for error in kept.slim_report.errors.values())
    small = slim(model, budget=900)
    assert sum(p.numel() for p in small.parameters()) <= 900
    before, after = small.slim_report.parameters
    assert before == sum(p.numel() for p in model.parameters())
    assert after == sum(p.numel() for p in small.parameters())
    assert f"{after:,} parameters, {before:,} before" in str(small.slim_report) and "layers.1" in str(
        small.slim_report
    )


def test_ranks_by_layer():
    small = slim(KAN([20, 16, 8]), {"layers.0": (4, 4, 3)})
    assert [type(layer).__name__ for layer in small.layers] == ["SlimKANLinear", "KANLinear"]
    assert small.slim_report.dense == ["layers.1"]


def test_a_layer_that_would_grow_is_left_dense_and_named():
    with pytest.warns(UserWarning, match=r"Left dense, .*: layers\.1\."):
        small = slim(KAN([20, 16, 1]), [8, 8, 8])
    assert small.slim_report.dense == ["layers.1"] and list(small.slim_report.errors) == ["layers.0"]
    assert "layers.1  left dense" in str(small.slim_report)


def test_energy_of_a_random_tensor_saves_nothing_and_says_what_to_do():
    with pytest.warns(UserWarning, match="Left dense, .* Pass `inputs`"):
        assert slim(KAN([20, 16, 8]), energy=0.99).slim_report.parameters == (4032, 4032)


def test_ranks_above_the_modes_are_capped_with_a_warning():
    with pytest.warns(UserWarning, match=r"capped. layers\.0: \(3, 4, 50\) for \(16, 20, 9\), made \(3, 4, 9\)"):
        slim(KAN([20, 16]), (3, 4, 50))


def test_one_layer():
    layer = FAMILIES["own"](12, 10)
    small = slim(layer, RANKS)
    assert isinstance(small, SlimKANLinear) and small.slim_report.ranks == {"": RANKS}
    small = slim(FAMILIES["cheby-kan"](12, 10), RANKS)
    assert isinstance(small, SlimLayer)
    assert type(to_dense(small)) is FAMILIES["cheby-kan"].func


def test_kan_model(tmp_path):
    model = KANModel(KANConfig(widths=(20, 16, 3))).eval()
    model.kan.update_grid(torch.randn(50, 20))
    small = slim(model, {"kan.layers.0": (4, 4, 3)})
    small.save_pretrained(tmp_path)
    loaded = KANModel.from_pretrained(tmp_path)
    assert loaded.config.ranks == ((4, 4, 3), None)
    x = torch.randn(5, 20)
    assert torch.equal(loaded(x).logits, small(x).logits)
    dense = to_dense(loaded)
    dense.save_pretrained(tmp_path)
    assert KANModel.from_pretrained(tmp_path).config.ranks is None


def test_pykan_network():
    from kan import MultKAN

    model = MultKAN(width=[12, 10, 3], device="cpu", auto_save=False, symbolic_enabled=False)
    x = points()
    model(x)  # leaves activations behind, which deepcopy refuses
    small = slim(model, RANKS[::-1])
    y = small(x)
    copied = copy.deepcopy(slim(model, RANKS[::-1]))
    assert torch.equal(copied(x), y)
    assert relative(small.to_dense()(x), y) < 1e-5
    assert small.act_fun[0].coef.shape == model.act_fun[0].coef.shape
    with pytest.raises(RuntimeError, match="`update_grid_from_samples` refits the coefficients"):
        small.act_fun[0].update_grid_from_samples(x)


def test_slim_layers_are_recognized_whatever_is_registered():
    small = slim(nn.Sequential(FAMILIES["efficient-kan"](12, 10), FAMILIES["own"](10, 10)), RANKS)
    assert [layer.family for layer in find_kan_layers(small)] == ["slim", "slim-kan"]
    assert find_kan_layers(small)[0].shape == (10, 12, 8) and find_kan_layers(small)[0].has_residual
    try:
        register_kan_layer(
            "greedy", matches=lambda m: hasattr(m, "b_splines"), coefficients=("spline_weight", "o i k")
        )
        assert find_kan_layers(small)[0].family == "slim"
    finally:
        from peft_lotra.layers import registry

        registry._SPECS.pop("greedy")


def test_refuses():
    model = KAN([20, 16, 8])
    for arguments in ({}, {"ranks": 2, "energy": 0.5}, {"energy": 0.5, "budget": 500}):
        with pytest.raises(ValueError, match="Pass one of `ranks`, `energy` and `budget`"):
            slim(model, **arguments)
    for energy in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="`energy` must be above 0 and at most 1"):
            slim(model, energy=energy)
    with pytest.raises(ValueError, match=r"`budget` is 50, but ranks of 1 in each of the 2 layers take"):
        slim(model, budget=50)
    for ranks in (0, (2, -1, 2), {"layers.0": 0}):
        with pytest.raises(ValueError, match="`ranks` should be a positive integer"):
            slim(model, ranks)
    with pytest.raises(ValueError, match="`ranks` names none of the KAN layers"):
        slim(model, {"elsewhere": 2})
    with pytest.raises(ValueError, match="No KAN layer that could be compressed"):
        slim(nn.Linear(2, 2), 2)
    with torch.no_grad():
        model.layers[1].base_weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"coefficients of `layers\.1` are not finite"):
        slim(model, 2)


def test_refuses_adapters():
    model = get_peft_model(KAN([20, 16, 8]), LoTRAConfig(r=2))
    for which in (model, model.base_model, model.base_model.model):
        with pytest.raises(ValueError, match="has adapters .* merge them first"):
            slim(which, 2)
    small = get_peft_model(slim(KAN([20, 16, 8]), 2), LoTRAConfig(r=2)).base_model.model
    with pytest.raises(ValueError, match="has adapters: merge them first"):
        to_dense(small)
