# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
from helpers import (
    adapt,
    assert_equal,
    assert_same,
    base,
    inputs,
    lotra_layers,
    nested,
    perturbed,
    refused,
    snapshot,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model
from stand_ins import LAYER_KINDS, ChebyKANLayer, as_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import extract_lotra, update_spectrum
from peft_lotra.kan import KAN, KANLinear


def fine_tuned(model, x, steps=5):
    return train(copy.deepcopy(model), x, torch.randn_like(model(x)), steps, lr=1e-2)


@pytest.mark.parametrize("kind, scale", [("efficient-kan", "spline_scaler"), ("pykan", "scale_sp")])
@pytest.mark.filterwarnings("error")
def test_a_change_of_the_scales_is_taken_up_by_the_coefficients(kind, scale):
    model = base(kind, torch.float64)
    x = inputs(dtype=torch.float64)
    tuned, start = copy.deepcopy(model), model(x)
    with torch.no_grad():
        getattr(tuned.kan, scale).mul_(1.5)
    extracted = extract_lotra(model, tuned, r=100)

    assert extracted.extraction_report.errors["kan"] < 1e-2  # L-BFGS, for scales of which some are near zero
    assert (extracted(x) - tuned(x)).norm() < 2e-2 * (tuned(x) - start).norm()


@pytest.mark.filterwarnings("ignore:.*cannot hold")  # fast-kan's bias and norm
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "efficient-kan-no-scaler", "pykan", "inkan", "fast-kan"])
def test_the_reported_error_is_the_true_one(kind, tmp_path):
    model, x = base(kind, in_features=8, out_features=7), inputs(16, in_features=8)
    tuned, bare = fine_tuned(model, x), copy.deepcopy(model)
    extracted = extract_lotra(model, tuned, r=(2, 2, 3))
    extracted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)

    assert_equal(loaded(x), extracted(x))

    merged = loaded.merge_and_unload()
    error = update_spectrum(tuned, merged).layers["kan"].norm / update_spectrum(bare, tuned).layers["kan"].norm

    assert 0.05 < error < 1
    assert extracted.extraction_report.errors["kan"] == pytest.approx(error, abs=1e-5)
    assert extracted.extraction_report.ranks["kan"] == (2, 2, 3)


@pytest.mark.filterwarnings("error")
def test_a_network_of_pykan_is_extracted():
    """Nothing but coefficients and scales was trained."""
    from kan import KAN as PyKAN

    model = PyKAN([3, 4, 2], auto_save=False, device="cpu").speed()
    x = inputs(32)
    tuned = fine_tuned(model, x, 20)
    extracted = extract_lotra(model, tuned, energy=0.9999)
    assert set(extracted.extraction_report.errors) == {"act_fun.0", "act_fun.1"}
    assert all(error < 0.05 for error in extracted.extraction_report.errors.values())
    assert (extracted(x) - tuned(x)).norm() < 0.1 * (tuned(x) - extracted.unload()(x)).norm()


def test_ranks_are_chosen_under_a_budget_or_for_an_energy():
    model = KAN([6, 8, 5])
    tuned = fine_tuned(model, inputs(32, in_features=6))
    report = extract_lotra(copy.deepcopy(model), tuned, budget=150).extraction_report

    assert report.parameters <= 150

    report = extract_lotra(copy.deepcopy(model), tuned, energy=0.8).extraction_report

    assert all(error**2 <= 0.2 + 1e-5 for error in report.errors.values())

    pattern = {"layers.0": 1, "layers.1": (2, 3, 1)}
    report = extract_lotra(copy.deepcopy(model), tuned, rank_pattern=pattern).extraction_report

    assert report.ranks == {"layers.0": (1, 1, 1), "layers.1": (2, 3, 1)}
    assert "layers.0" in str(report)
    assert f"{report.parameters:,} parameters" in str(report)


def test_other_modules_that_changed_are_saved_and_layers_that_did_not_are_left_out(tmp_path):
    model = nested()
    tuned, bare = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        tuned["head"].weight.add_(1)
        tuned["tail"].layers[0].spline_weight.add_(0.1)
    extracted = extract_lotra(model, tuned, r=100)
    report = extracted.extraction_report

    assert (report.modules_to_save, report.not_saved, list(report.errors)) == (["head"], [], ["tail.layers.0"])
    assert list(lotra_layers(extracted.base_model.model)) == ["tail.layers.0"]
    assert_equal(extracted.base_model.model["head"].weight, tuned["head"].weight)

    extracted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare, tmp_path)

    assert_equal(loaded.base_model.model["head"].weight, tuned["head"].weight)

    x = torch.rand(2, 4)

    assert_equal(loaded.base_model.model["tail"](x), extracted.base_model.model["tail"](x))


def test_a_warning_names_what_cannot_be_saved():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kan = LAYER_KINDS["fast-kan"](3, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.scale * self.kan(x)

    model = Net()
    tuned = fine_tuned(model, inputs())
    with pytest.warns(UserWarning, match="scale.*kan.base_linear.bias.*cannot hold"):
        report = extract_lotra(model, tuned, r=2).extraction_report
    assert report.modules_to_save == []
    assert {"scale", "kan.base_linear.bias"} <= set(report.not_saved)


@pytest.mark.parametrize("data", [None, torch.rand(60, 3)])
def test_tuned_may_be_adapted(data):
    """By this method and another one, beside a copy of a module."""
    model = nested()
    tuned = adapt(copy.deepcopy(model), r=2, adapter_name="first", modules_to_save=["head"])
    tuned.base_model.model["head"].modules_to_save["first"].bias.data += 1
    before = snapshot(tuned)
    extracted = extract_lotra(copy.deepcopy(model), tuned, r=100, inputs=data, adapter_name="second")

    assert_same(tuned, before)

    report, x = extracted.extraction_report, torch.rand(5, 3)

    assert list(extracted.peft_config) == ["second"]
    assert report.modules_to_save == ["head"]
    assert_close(extracted.eval()(x), tuned(x), rtol=1e-3, atol=1e-3)

    lora = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["head"], init_lora_weights=False))

    with refused("nothing to extract"):
        extract_lotra(model, lora, r=2)


def retrained():
    """A network of the sizes of the base."""
    return KAN([3, 5, 4])


def with_nan():
    tuned = retrained()
    tuned.layers[1].base_weight.data[0, 0] = torch.nan
    return tuned


def with_moved_grid():
    tuned = retrained()
    tuned.layers[1].grid_bounds[0] = torch.tensor([-2.0, 2.0])
    return tuned


def with_head():
    tuned = retrained()
    tuned.head = nn.Linear(2, 2)
    return tuned


@pytest.mark.parametrize(
    "tuned, kwargs, message",
    [
        (lambda: KAN([3, 6, 4]), {}, r"differ in .*layers\.0\.spline_weight"),
        (lambda: KAN([3, 5, 4, 4]), {}, r"differ in .*layers\.2\.spline_weight"),
        (lambda: KAN([3, 5, 4], grid_size=6, spline_order=2), {}, r"grid of `layers\.0` differs"),
        (with_nan, {}, r"coefficients of `layers\.1` are not finite"),
        (with_moved_grid, {}, r"grid of `layers\.1` differs.*update_grid"),
        (retrained, {"r": 2, "inputs": torch.full((9, 3), torch.nan)}, "NaN"),
        (retrained, {"r": 2, "energy": 0.5}, "one of r, energy, budget"),
        (retrained, {"r": None}, "one of r, energy, budget"),
        (retrained, {"energy": 0.0}, r"`energy` is 0.0, but must be a number in \(0, 1\]"),
        (retrained, {"budget": 31}, "2 layers take 3[0-9]"),
        (retrained, {"r": 0}, "positive integer"),
        (retrained, {"rank_pattern": {"layers.0": 2}}, r"no ranks for \['layers\.1'\]"),
        (with_head, {}, "differ in .*head.weight"),
    ],
)  # fmt: skip
def test_errors_leave_the_base_as_it_was(tuned, kwargs, message):
    model, tuned = KAN([3, 5, 4]), tuned()

    with refused(message, model):
        extract_lotra(model, tuned, **(kwargs or {"r": 2}))


def test_an_unchanged_or_adapted_base_is_refused():
    model = KAN([3, 5, 4])

    with refused("nothing to extract", model):
        extract_lotra(model, copy.deepcopy(model), r=2)
    with refused("`base` has adapters"):
        extract_lotra(adapt(model), model, r=2)


def correlated(rows=60, in_features=8):
    """Inputs of two directions, as data of many dimensions have few."""
    return torch.tanh(torch.randn(rows, 2, dtype=torch.float64) @ torch.randn(2, in_features, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*cannot hold")  # fast-kan's bias and norm
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "efficient-kan-no-scaler", "pykan", "fast-kan"])
def test_with_inputs_the_outputs_are_met_better_and_their_error_is_the_true_one(kind):
    model, x = base(kind, torch.float64, in_features=8, out_features=7), correlated()
    tuned = fine_tuned(model, x, 20)
    bare, errors = copy.deepcopy(model), {}
    for data in (None, x):
        extracted = extract_lotra(copy.deepcopy(bare), tuned, r=(3, 3, 3), inputs=data)
        report = extracted.extraction_report
        change = tuned(x) - bare(x)
        errors[data is x] = ((tuned(x) - extracted(x)).norm() / change.norm()).item()

    assert errors[True] < 0.8 * errors[False], errors

    if kind != "fast-kan":  # of which something changed that no adapter holds
        assert report.output_errors["kan"] == pytest.approx(errors[True], abs=1e-5)


def test_scales_of_the_edges_count_with_inputs_even_if_they_did_not_change():
    model, x = base("efficient-kan", torch.float64, in_features=8, out_features=7), correlated()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.kan.spline_weight.add_(0.3 * torch.randn_like(tuned.kan.spline_weight))
    bare = copy.deepcopy(model)
    extracted = extract_lotra(model, tuned, r=(3, 3, 3), inputs=x)
    error = ((tuned(x) - extracted(x)).norm() / (tuned(x) - bare(x)).norm()).item()

    assert extracted.extraction_report.output_errors["kan"] == pytest.approx(error, abs=1e-5)


def test_with_inputs_ranks_are_chosen_by_the_outputs():
    model, x = KAN([8, 9, 5], dtype=torch.float64), correlated()
    adapted = adapt(copy.deepcopy(model), r=(3, 3, 3))
    weighted, plain = (
        extract_lotra(copy.deepcopy(model), adapted, budget=200, inputs=data).extraction_report for data in (x, None)
    )

    assert weighted.parameters <= 200
    assert weighted.ranks != plain.ranks
    assert f"{weighted.output_errors['layers.1']:.2%}" in str(weighted)
    assert not plain.output_errors


class Squared(ChebyKANLayer):
    def forward(self, x):
        return super().forward(x) ** 2


def test_layers_that_are_not_linear_are_not_weighted_by_inputs():
    model, x = as_model(Squared(3, 4, 4)).double(), inputs(dtype=torch.float64)
    tuned = perturbed(model)
    extracted = extract_lotra(model, tuned, r=100, inputs=x)

    assert not extracted.extraction_report.output_errors
    assert_close(extracted(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_the_model_calls_twice():
    layer = KANLinear(3, 3)
    model = nn.Sequential(layer, layer, nn.Linear(3, 1))
    tuned, x = perturbed(model), torch.rand(5, 3)

    extracted = extract_lotra(model, tuned, r="full")

    assert extracted.extraction_report.modules_to_save == ["2"]
    assert_close(extracted(x), tuned(x))


@pytest.mark.parametrize("tune", [adapt, lambda model: fine_tuned(model, inputs())])
def test_compiled_models_are_their_networks(tune):
    model, x = KAN([3, 4]), inputs()
    tuned = tune(copy.deepcopy(model))

    extracted = extract_lotra(torch.compile(model), torch.compile(tuned), r="full")

    assert_close(extracted(x), tuned(x))


def test_a_head_whose_name_a_kan_layer_ends_with():
    """ "1" is the end of "0.layers.1", which PEFT would have copied whole; the base was left half adapted."""
    model = nn.Sequential(KAN([3, 4, 4]), nn.Linear(4, 2))
    tuned, x = perturbed(model), torch.rand(5, 3)

    with pytest.warns(UserWarning, match=r"also changed 1\.weight, 1\.bias, which a LoTRA adapter cannot hold"):
        extracted = extract_lotra(model, tuned, r=100)
    assert extracted.extraction_report.modules_to_save == []
    assert_close(extracted.base_model.model[0](x), tuned[0](x))
