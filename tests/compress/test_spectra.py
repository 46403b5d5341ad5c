# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import math

import pytest
import torch
from helpers import adapt, assert_same, base, lotra_layers, perturbed, refuses, snapshot
from stand_ins import LAYER_KINDS
from torch.testing import assert_close

from peft_lotra import extract_lotra, update_spectrum
from peft_lotra.compress.spectra import choose_ranks, spectrum_of
from peft_lotra.kan import KAN
from peft_lotra.tucker import cap_ranks, reconstruct, tucker


def tucker_tensor(shape=(9, 7, 8), ranks=(3, 2, 4)):
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    return reconstruct(torch.randn(ranks, dtype=torch.float64), *factors)


@pytest.mark.parametrize("shape", [(6, 5, 4), (5, 4, 3, 4)])
def test_energies_and_singular_values_are_those_of_the_projections(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    layer = spectrum_of(tensor)

    for mode, values in enumerate(layer.singular_values):
        assert_close(values, torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1)))

    for ranks in ((1, 1, 1, 1), (2, 3, 1, 2), (4, 2, 3, 4), shape):
        projected = tensor
        for mode, rank in zip(range(tensor.dim()), ranks, strict=False):
            left = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False)[0][:, :rank]
            projected = torch.tensordot(left @ left.T, projected, ([1], [mode])).movedim(0, mode)
        kept = (projected.norm() / tensor.norm()).square().item()
        assert layer.energy(ranks) == pytest.approx(kept, abs=1e-12)

    assert layer.energy(100) == pytest.approx(1)
    assert spectrum_of(torch.zeros(shape)).energies.min() == 1


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_update_of_an_adapter_has_its_ranks(kind):
    model = base(kind, torch.float64, 6, 7)
    ranks = (2, 3, 4)
    adapted = adapt(copy.deepcopy(model), r=ranks).double().train()  # no dropout in what is read
    before = snapshot(adapted)
    spectrum = update_spectrum(model, adapted)

    assert_same(adapted, before)

    layer = spectrum.layers["kan"]
    (lotra,) = lotra_layers(adapted).values()

    assert layer.shape == lotra.get_delta_weight("default").shape
    assert layer.energy(ranks) == pytest.approx(1, abs=1e-12)

    with adapted.disable_adapter():
        assert update_spectrum(model, adapted).layers["kan"].norm == 0
    adapted.merge_adapter()

    assert update_spectrum(model, adapted).layers["kan"].norm == pytest.approx(layer.norm)


def test_an_energy_takes_the_cheapest_ranks():
    layers = {"a": spectrum_of(torch.randn(5, 4, 3)), "b": spectrum_of(tucker_tensor())}
    for energy in (0.3, 0.8, 0.95, 1.0):
        for name, ranks in choose_ranks(layers, energy=energy).items():
            layer = layers[name]
            cost = layer.costs()[tuple(r - 1 for r in ranks)]
            assert layer.energy(ranks) >= energy - 1e-9
            assert not (layer.energies[layer.costs() < cost] >= energy).any()

    assert choose_ranks(layers, energy=1.0)["b"] == (3, 2, 8)  # a full basis has no factor, and costs less than 4


@pytest.mark.parametrize("shape", [(6, 5, 4), (3, 2, 9), (40, 1, 9), (5, 4, 3, 4)])
def test_the_cost_of_ranks_is_the_number_of_parameters_of_such_an_adapter(shape):
    costs = spectrum_of(torch.randn(shape)).costs()

    assert costs.shape == shape
    for ranks in [(1,) * len(shape), (*shape[:2], *[1] * (len(shape) - 2)), shape, (3, 1, 3, 2)[: len(shape)]]:
        ranks = cap_ranks(ranks, shape)
        assert costs[tuple(r - 1 for r in ranks)] == tucker(torch.randn(shape), ranks).numel()


def test_a_budget_keeps_nearly_the_most_energy():
    layers = {"a": spectrum_of(torch.randn(5, 4, 3)), "b": spectrum_of(3 * tucker_tensor((6, 5, 4), (2, 2, 2)))}
    least = sum(layer.costs().min() for layer in layers.values())
    last = 0.0
    for budget in range(least, 130, 7):
        ranks = choose_ranks(layers, budget=budget)
        costs = {name: layer.costs()[tuple(r - 1 for r in ranks[name])] for name, layer in layers.items()}
        assert sum(costs.values()) <= budget
        kept = sum(layer.norm**2 * layer.energy(ranks[name]) for name, layer in layers.items())
        flat = [(layer.costs().flatten(), layer.norm**2 * layer.energies.flatten()) for layer in layers.values()]
        (cost_a, energy_a), (cost_b, energy_b) = flat
        possible = cost_a[:, None] + cost_b <= budget
        best = torch.where(possible, energy_a[:, None] + energy_b, 0).max().item()
        total = sum(layer.norm**2 for layer in layers.values())
        assert kept >= best - 0.1 * total
        last = max(last, kept / total)

    assert last > 0.95


def test_a_matrix_times_one_shape_is_found():
    base_model, shape = KAN([12, 10]), torch.randn(8)
    tuned = copy.deepcopy(base_model)
    with torch.no_grad():
        tuned.layers[0].spline_weight += torch.randn(10, 12, 1) * shape

    model = extract_lotra(base_model, tuned, energy=0.9999)

    assert model.peft_config["default"].rank_pattern == {r"^layers\.0": ("full", "full", 1)}
    assert model.extraction_report.parameters == 12 * 10 + 9


def test_a_budget_goes_where_the_outputs_of_the_model_change():
    base_model = KAN([6, 6, 6])
    tuned = perturbed(base_model)
    # what the first layer computes hardly reaches the output
    for model in (base_model, tuned):
        model.layers[1].spline_weight.data *= 1e-4
        model.layers[1].base_weight.data *= 1e-4
    with torch.no_grad():
        for parameter in tuned.layers[1].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    first, second = extract_lotra(
        base_model, tuned, budget=200, inputs=torch.rand(200, 6)
    ).extraction_report.ranks.values()

    assert math.prod(first) < math.prod(second)


@pytest.mark.parametrize("kind, names", [("efficient-kan", "spline_weight spline_scaler"), ("pykan", "coef scale_sp")])
def test_scales_of_edges_are_part_of_the_update(kind, names):
    model = base(kind)
    tuned = copy.deepcopy(model)
    coefficients, scale = (getattr(tuned.kan, name).data for name in names.split())
    scale.mul_(1.5)
    expected = (coefficients * scale[..., None]).norm().item() / 3

    assert update_spectrum(model, tuned).layers["kan"].norm == pytest.approx(expected, rel=1e-5)


def test_a_spectrum_prints_as_a_table():
    model = KAN([3, 5, 4])

    text = str(update_spectrum(model, perturbed(model)))

    assert "5 x 3 x 9" in text
    assert "kept by (4, 4, 4)" in text


test_models_that_cannot_be_compared_are_refused = refuses(
    {
        r"layers\.1.*\(4, 5, 8\).*\(6, 5, 8\)": lambda: update_spectrum(KAN([3, 5, 4]), KAN([3, 5, 6])),
        r"layers\.2.* None": lambda: update_spectrum(KAN([3, 5, 4, 4]), KAN([3, 5, 4])),
    }
)
