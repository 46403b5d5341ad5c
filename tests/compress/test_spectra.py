# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, snapshot
from peft import get_peft_model
from stand_ins import FAMILIES

from peft_lotra import LoTRAConfig, find_kan_layers, gradient_spectrum, suggest_ranks, update_spectrum
from peft_lotra.compress.spectra import Spectrum, spectrum_of
from peft_lotra.kan import KAN
from peft_lotra.tucker import reconstruct


def tucker_tensor(shape=(9, 7, 8), ranks=(3, 2, 4)) -> torch.Tensor:
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    return reconstruct(torch.randn(ranks, dtype=torch.float64), *factors)


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in find_kan_layers(model):
            for parameter in model.get_submodule(layer.name).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    return model


@pytest.mark.parametrize("shape", [(6, 5, 4), (5, 4, 3, 4)])
def test_energies_and_singular_values_are_those_of_the_projections(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    layer = spectrum_of(tensor)
    for mode, values in enumerate(layer.singular_values):
        torch.testing.assert_close(values, torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1)))
    for ranks in ((1, 1, 1, 1), (2, 3, 1, 2), (4, 2, 3, 4), shape):
        projected = tensor
        for mode, rank in zip(range(tensor.dim()), ranks, strict=False):
            left = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False)[0][:, :rank]
            projected = torch.tensordot(left @ left.T, projected, ([1], [mode])).movedim(0, mode)
        kept = (projected.norm() / tensor.norm()).square().item()
        assert layer.energy(ranks) == pytest.approx(kept, abs=1e-12)
    assert layer.energy(100) == pytest.approx(1) and spectrum_of(torch.zeros(shape)).energies.min() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_of_an_adapter_has_its_ranks(family):
    model = base(family, torch.float64, 6, 7)
    ranks = (2, 3, 4)
    adapted = adapt(copy.deepcopy(model), r=ranks).double().train()  # no dropout in what is read
    before = snapshot(adapted)
    spectrum = update_spectrum(model, adapted)
    assert_same(adapted, before)
    layer = spectrum.layers["kan"]
    (lotra,) = lotra_layers(adapted).values()
    assert layer.shape == lotra.get_delta_weight("default").shape
    assert layer.energy(ranks) == pytest.approx(1, abs=1e-12)
    assert suggest_ranks(spectrum, energy=1.0) == {"^kan": ranks}
    with adapted.disable_adapter():
        assert update_spectrum(model, adapted).layers["kan"].norm == 0
    adapted.merge_adapter()
    assert update_spectrum(model, adapted).layers["kan"].norm == pytest.approx(layer.norm)


def test_energy_mode_finds_the_cheapest_ranks():
    spectrum = Spectrum({"a": spectrum_of(torch.randn(5, 4, 3)), "b": spectrum_of(tucker_tensor())})
    for energy in (0.3, 0.8, 0.95, 1.0):
        for name, ranks in suggest_ranks(spectrum, energy=energy).items():
            layer = spectrum.layers[name[1:]]
            cost = layer.costs()[tuple(r - 1 for r in ranks)]
            assert layer.energy(ranks) >= energy - 1e-9
            assert not (layer.energies[layer.costs() < cost] >= energy).any()
    assert suggest_ranks(spectrum, energy=1.0)["^b"] == (3, 2, 4)


def test_budget_mode_is_near_the_best_and_never_above_the_budget():
    layers = {"a": spectrum_of(torch.randn(5, 4, 3)), "b": spectrum_of(3 * tucker_tensor((6, 5, 4), (2, 2, 2)))}
    spectrum = Spectrum(layers)
    least = sum(1 + sum(layer.shape) for layer in layers.values())
    last = 0.0
    for budget in range(least, 130, 7):
        ranks = suggest_ranks(spectrum, budget=budget)
        costs = {name: layer.costs()[tuple(r - 1 for r in ranks["^" + name])] for name, layer in layers.items()}
        assert sum(costs.values()) <= budget
        kept = spectrum.energy(ranks)
        total = sum(layer.norm**2 for layer in layers.values())
        flat = [(layer.costs().flatten(), layer.norm**2 * layer.energies.flatten()) for layer in layers.values()]
        (cost_a, energy_a), (cost_b, energy_b) = flat
        possible = cost_a[:, None] + cost_b <= budget
        best = torch.where(possible, energy_a[:, None] + energy_b, 0).max().item() / total
        assert kept >= best - 0.1
        last = max(last, kept)
    assert last > 0.95


def test_a_layer_that_did_not_change_gets_the_least():
    model = KAN([3, 5, 4])
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.layers[1].spline_weight.add_(torch.randn_like(tuned.layers[1].spline_weight))
    for wish in ({"energy": 0.9}, {"budget": 150}, {"energy": 0.9, "inputs": torch.rand(50, 3)}):
        ranks = suggest_ranks(model, tuned, **wish)
        assert ranks[r"^layers\.0"] == (1, 1, 1) != ranks[r"^layers\.1"]
    unchanged = suggest_ranks(model, copy.deepcopy(model), energy=0.9, inputs=torch.rand(50, 3))
    assert set(unchanged.values()) == {(1, 1, 1)}


def test_the_config_takes_the_ranks_and_each_layer_gets_its_own():
    model = nested()
    ranks = suggest_ranks(model, perturbed(model), budget=400)
    adapted = get_peft_model(model, LoTRAConfig(rank_pattern=ranks))
    layers = lotra_layers(adapted.base_model.model)
    # PEFT reads "body.0" as the end of a name: none must take another one's ranks
    assert {"^" + name.replace(".", r"\."): layer.lotra_r["default"] for name, layer in layers.items()} == ranks
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lotra_" in n) <= 400


@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan", "inkan", "fast-kan"])
def test_gradient_spectrum(family):
    model = base(family, torch.float64)
    x = inputs(dtype=torch.float64)
    before = snapshot(model)
    spectrum = gradient_spectrum(model, None, lambda: model(x).square().sum().backward())
    assert_same(model, before)
    tensor = find_kan_layers(model)[0]
    assert spectrum.layers["kan"].shape == (*tensor.shape[:2], tensor.shape[2] + tensor.has_residual)
    assert spectrum.layers["kan"].norm > 0
    config = LoTRAConfig(adapt_residual=False)
    spectrum = gradient_spectrum(model, config, lambda: model(x).square().sum().backward())
    assert spectrum.layers["kan"].shape == tensor.shape and config.target_modules is None


@pytest.mark.parametrize(
    "family, names", [("efficient-kan", "spline_weight spline_scaler"), ("pykan", "coef scale_sp")]
)
def test_scales_of_edges_are_part_of_the_update(family, names):
    model = base(family)
    tuned = copy.deepcopy(model)
    coefficients, scale = (getattr(tuned.kan, name).data for name in names.split())
    scale.mul_(1.5)
    expected = (coefficients * scale[..., None]).norm().item() / 3
    assert update_spectrum(model, tuned).layers["kan"].norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "one of energy, budget"),
        ({"energy": 0.9, "budget": 100}, "one of energy, budget"),
        ({"energy": 0.0}, r"`energy` is 0.0, but must be a number in \(0, 1\]"),
        ({"budget": 36}, "2 layers take 37"),
    ],
)
def test_wrong_arguments(kwargs, message):
    model = KAN([3, 5, 4])
    spectrum = update_spectrum(model, perturbed(model))
    assert "5 x 3 x 9" in str(spectrum) and "kept by (4, 4, 4)" in str(spectrum)
    with pytest.raises(ValueError, match=message):
        suggest_ranks(spectrum, **kwargs)


def test_wrong_models():
    model = KAN([3, 5, 4])
    with pytest.raises(ValueError, match=r"layers\.1.*\(4, 5, 8\).*\(6, 5, 8\)"):
        update_spectrum(model, KAN([3, 5, 6]))
    with pytest.raises(ValueError, match=r"layers\.2.* None"):
        update_spectrum(KAN([3, 5, 4, 4]), model)
    with pytest.raises(ValueError, match="No KAN layer"):
        update_spectrum(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for given in (None, torch.rand(9, 3)):
        with pytest.raises(ValueError, match="either a spectrum, or a base model and a tuned one"):
            suggest_ranks(model, energy=0.9, inputs=given)
    spectrum = update_spectrum(model, copy.deepcopy(model))
    for given in ({"tuned": model}, {"inputs": torch.rand(9, 3)}):
        with pytest.raises(ValueError, match="either a spectrum, or a base model and a tuned one"):
            suggest_ranks(spectrum, energy=0.9, **given)
    broken = copy.deepcopy(model)
    broken.layers[0].base_weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`layers\.0` are not finite"):
        update_spectrum(model, broken)
