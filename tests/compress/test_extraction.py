# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import warnings
from operator import attrgetter

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from stand_ins import FAMILIES, ChebyKANLayer

from peft_lotra import register_kan_layer
from peft_lotra.compress.extraction import extract_lotra
from peft_lotra.compress.spectra import update_spectrum
from peft_lotra.compress.updates import coefficient_updates
from peft_lotra.kan import KAN
from peft_lotra.layers import registry
from peft_lotra.layers.registry import get_kan_spec
from peft_lotra.tuner.targets import exact_targets


def fine_tuned(model: torch.nn.Module, x: torch.Tensor, steps: int = 5) -> torch.nn.Module:
    model = copy.deepcopy(model)
    y = torch.randn_like(model(x))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_ranks_give_the_fine_tuned_coefficients_back(family):
    model = base(family, torch.float64)
    x = inputs(dtype=torch.float64)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name in get_kan_spec(tuned.kan).locate(tuned.kan).parameters:
            parameter = attrgetter(name)(tuned.kan)
            parameter.add_(0.1 * torch.randn_like(parameter))
    extracted = extract_lotra(model, tuned, r=100)
    assert extracted.extraction_report.errors["kan"] < 1e-6
    torch.testing.assert_close(extracted(x), tuned(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, scale", [("efficient-kan", "spline_scaler"), ("pykan", "scale_sp")])
def test_a_change_of_the_scales_is_taken_up_by_the_coefficients(family, scale):
    model = base(family, torch.float64)
    x = inputs(dtype=torch.float64)
    tuned, start = copy.deepcopy(model), model(x)
    with torch.no_grad():
        getattr(tuned.kan, scale).mul_(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extracted = extract_lotra(model, tuned, r=100)
    assert extracted.extraction_report.errors["kan"] < 1e-2  # L-BFGS, for scales of which some are near zero
    assert (extracted(x) - tuned(x)).norm() < 2e-2 * (tuned(x) - start).norm()


@pytest.mark.parametrize("family", ["own", "efficient-kan", "efficient-kan-no-scaler", "pykan", "inkan", "fast-kan"])
def test_the_reported_error_is_the_true_one(family, tmp_path):
    model, x = base(family, in_features=8, out_features=7), inputs(16, in_features=8)
    tuned, bare = fine_tuned(model, x), copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fast-kan's bias and norm
        extracted = extract_lotra(model, tuned, r=(2, 2, 3))
    extracted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
    torch.testing.assert_close(loaded(x), extracted(x), rtol=0, atol=0)
    wanted = coefficient_updates(bare, tuned)["kan"]
    got = coefficient_updates(bare, loaded.merge_and_unload())["kan"]
    reached = got.tensor if wanted.scale is None else wanted.scale * got.tensor
    error = ((wanted.tensor - reached).norm() / wanted.tensor.norm()).item()
    assert 0.05 < error < 1
    assert extracted.extraction_report.errors["kan"] == pytest.approx(error, abs=1e-6)
    assert extracted.extraction_report.ranks["kan"] == (2, 2, 3)


def test_mult_kan():
    from kan import KAN as PyKAN

    model = PyKAN([3, 4, 2], auto_save=False, device="cpu").speed()
    x = inputs(32)
    tuned = fine_tuned(model, x, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing but coefficients and scales is trained
        extracted = extract_lotra(model, tuned, energy=0.9999)
    assert set(extracted.extraction_report.errors) == {"act_fun.0", "act_fun.1"}
    assert all(error < 0.05 for error in extracted.extraction_report.errors.values())
    assert (extracted(x) - tuned(x)).norm() < 0.1 * (tuned(x) - extracted.unload()(x)).norm()


def test_ranks_are_chosen_under_a_budget_or_for_an_energy():
    model = KAN([6, 8, 5])
    tuned = fine_tuned(model, inputs(32, in_features=6))
    spectrum = update_spectrum(model, tuned)
    report = extract_lotra(copy.deepcopy(model), tuned, budget=150).extraction_report
    assert report.parameters <= 150
    report = extract_lotra(copy.deepcopy(model), tuned, energy=0.8).extraction_report
    assert all(error**2 <= 0.2 + 1e-6 for error in report.errors.values())
    assert all(spectrum.layers[name].energy(ranks) >= 0.8 for name, ranks in report.ranks.items())
    pattern = {"layers.0": 1, "layers.1": (2, 3, 1)}
    report = extract_lotra(copy.deepcopy(model), tuned, rank_pattern=pattern).extraction_report
    assert report.ranks == {"layers.0": (1, 1, 1), "layers.1": (2, 3, 1)}
    assert "layers.0" in str(report) and f"{report.parameters:,} parameters" in str(report)


def test_what_changed_elsewhere_is_saved_whole_and_what_did_not_change_is_left_out(tmp_path):
    model = nested()
    tuned, bare = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        tuned["head"].weight.add_(1)
        tuned["tail"].layers[0].spline_weight.add_(0.1)
    extracted = extract_lotra(model, tuned, r=100)
    report = extracted.extraction_report
    assert (report.modules_to_save, report.not_saved, list(report.errors)) == (["head"], [], ["tail.layers.0"])
    assert list(lotra_layers(extracted.base_model.model)) == ["tail.layers.0"]
    assert torch.equal(extracted.base_model.model["head"].weight, tuned["head"].weight)
    extracted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare, tmp_path)
    assert torch.equal(loaded.base_model.model["head"].weight, tuned["head"].weight)
    x = torch.rand(2, 4)
    assert torch.equal(loaded.base_model.model["tail"](x), extracted.base_model.model["tail"](x))


def test_what_cannot_be_saved_is_named():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kan = FAMILIES["fast-kan"](3, 4)
            self.scale = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.scale * self.kan(x)

    model = Net()
    tuned = fine_tuned(model, inputs())
    with pytest.warns(UserWarning, match="scale.*kan.base_linear.bias.*cannot hold"):
        report = extract_lotra(model, tuned, r=2).extraction_report
    assert report.modules_to_save == [] and {"scale", "kan.base_linear.bias"} <= set(report.not_saved)


def test_tuned_may_be_adapted():
    model = base("own")
    tuned = adapt(copy.deepcopy(model), r=2, adapter_name="first")
    extracted = extract_lotra(model, tuned, r=2, adapter_name="second")
    assert extracted.extraction_report.errors["kan"] < 1e-5 and list(extracted.peft_config) == ["second"]


def broken(change):
    tuned = KAN([3, 5, 4])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
        change(tuned)
    return tuned


def set_nan(model):
    model.layers[1].base_weight[0, 0] = torch.nan


def move_grid(model):
    model.layers[1].grid_bounds[0] = torch.tensor([-2.0, 2.0])


@pytest.mark.parametrize(
    "tuned, kwargs, message",
    [
        (lambda: KAN([3, 6, 4]), {}, r"`layers\.0\.spline_weight`: \(5, 3, 8\) in the base.*\(6, 3, 8\) in the tuned"),
        (lambda: KAN([3, 5, 4, 4]), {}, r"`layers\.2\.spline_weight`: absent in the base"),
        (lambda: KAN([3, 5, 4], grid_size=6, spline_order=2), {}, r"grid_size of `layers\.0` differs"),
        (lambda: broken(set_nan), {}, r"`layers\.1\.base_weight` of the tuned model is not finite"),
        (lambda: broken(move_grid), {}, r"grid_bounds of `layers\.1` differs.*update_grid"),
        (lambda: broken(lambda _: None), {"budget": 10}, "budget.* is 10"),
        (lambda: broken(lambda _: None), {"energy": 1.5}, "above 0 and at most 1"),
        (lambda: broken(lambda _: None), {"r": 2, "energy": 0.5}, "Pass one of"),
        (lambda: broken(lambda _: None), {"r": None}, "Pass one of"),
        (lambda: broken(lambda _: None), {"r": 0}, "positive integer"),
        (lambda: broken(lambda _: None), {"rank_pattern": {"layers.0": 2}}, r"no ranks for `layers\.1`"),
        (lambda: get_peft_model(nested(), LoraConfig(target_modules=["head"])), {}, "`head`.*another method"),
    ],
)  # fmt: skip
def test_errors_leave_the_base_as_it_was(tuned, kwargs, message):
    model, tuned = KAN([3, 5, 4]), tuned()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        extract_lotra(model, tuned, **(kwargs or {"r": 2}))
    assert_same(model, before)


def test_more_errors():
    model = KAN([3, 5, 4])
    with pytest.raises(ValueError, match="nothing to extract"):
        extract_lotra(model, copy.deepcopy(model), r=2)
    with pytest.raises(ValueError, match="`base` has adapters"):
        extract_lotra(adapt(copy.deepcopy(model)), model, r=2)


def test_exact_targets():
    model = torch.nn.ModuleDict({"0": torch.nn.Identity(), "a": torch.nn.ModuleDict({"0": torch.nn.Identity()})})
    assert exact_targets(["a.0"], model) == {"a.0"}
    assert exact_targets(["0", "a.0"], model) == {"0", "a.0"}
    assert exact_targets(["0"], model) == "0"


###############
# With inputs #
###############


def correlated(rows: int = 60, in_features: int = 8) -> torch.Tensor:
    """Inputs of two directions, as data of many dimensions have few."""
    return torch.tanh(torch.randn(rows, 2, dtype=torch.float64) @ torch.randn(2, in_features, dtype=torch.float64))


@pytest.mark.parametrize("family", ["own", "efficient-kan", "efficient-kan-no-scaler", "pykan", "fast-kan"])
def test_with_inputs_the_outputs_are_met_better_and_their_error_is_the_true_one(family):
    model, x = base(family, torch.float64, in_features=8, out_features=7), correlated()
    tuned = fine_tuned(model, x, 20)
    bare, errors = copy.deepcopy(model), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fast-kan's bias and norm
        for given in (None, x):
            extracted = extract_lotra(copy.deepcopy(bare), tuned, r=(3, 3, 3), inputs=given)
            report = extracted.extraction_report
            change = tuned(x) - bare(x)
            errors[given is x] = ((tuned(x) - extracted(x)).norm() / change.norm()).item()
    assert errors[True] < 0.8 * errors[False], errors
    if family != "fast-kan":  # of which something changed that no adapter holds
        assert report.output_errors["kan"] == pytest.approx(errors[True], abs=1e-6)
    wanted = coefficient_updates(bare, tuned, scaled=True)["kan"]
    got = coefficient_updates(bare, extracted.merge_and_unload(), scaled=True)["kan"]
    missed = (wanted.tensor - got.tensor).norm() / wanted.tensor.norm()
    assert report.errors["kan"] == pytest.approx(missed.item(), abs=1e-6)


def test_scales_of_the_edges_count_with_inputs_even_if_they_did_not_change():
    model, x = base("efficient-kan", torch.float64, in_features=8, out_features=7), correlated()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.kan.spline_weight.add_(0.3 * torch.randn_like(tuned.kan.spline_weight))
    bare = copy.deepcopy(model)
    extracted = extract_lotra(model, tuned, r=(3, 3, 3), inputs=x)
    error = ((tuned(x) - extracted(x)).norm() / (tuned(x) - bare(x)).norm()).item()
    assert extracted.extraction_report.output_errors["kan"] == pytest.approx(error, abs=1e-6)


def test_with_inputs_ranks_are_chosen_by_the_outputs_and_an_adapted_model_is_read():
    model, x = KAN([8, 9, 5], dtype=torch.float64), correlated()
    adapted = adapt(copy.deepcopy(model), r=(3, 3, 3))
    before = snapshot(adapted)
    reports = [
        extract_lotra(copy.deepcopy(model), tuned, budget=200, inputs=x).extraction_report
        for tuned in (adapted, copy.deepcopy(adapted).merge_and_unload())
    ]
    assert_same(adapted, before)
    assert reports[0].ranks == reports[1].ranks and reports[0].parameters <= 200
    assert reports[0].output_errors == pytest.approx(reports[1].output_errors, rel=1e-4)
    assert "of its outputs" in str(reports[0])
    without = extract_lotra(copy.deepcopy(model), adapted, budget=200).extraction_report
    assert without.output_errors is None and "outputs" not in str(without)


def test_inputs_that_do_not_fit_leave_the_base_as_it_was():
    model = KAN([8, 9, 5], dtype=torch.float64)
    tuned = fine_tuned(model, correlated())
    before = snapshot(model)
    with pytest.raises(ValueError, match="shape"):
        extract_lotra(model, tuned, r=2, inputs=correlated(in_features=7))
    for wrong, message in (
        (correlated(0), "shape"),
        (torch.nan * correlated(), "NaN"),
        ("text", "a str"),
    ):
        with pytest.raises(ValueError, match=message):
            extract_lotra(model, tuned, r=2, inputs=wrong)
    assert_same(model, before)


def raises(layer, x):
    raise ZeroDivisionError("by hand")


@pytest.mark.parametrize("basis", [raises, lambda layer, x: None, lambda layer, x: layer.no_such])
def test_a_basis_that_raises_is_no_basis(basis, monkeypatch):
    monkeypatch.setitem(registry._SPECS, "broken", registry._SPECS["cheby-kan"])  # and at the end there is none
    register_kan_layer("broken", matches=ChebyKANLayer, coefficients=("cheby_coeffs", "i o k"), basis=basis)
    model = base("cheby-kan", torch.float64)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.kan.cheby_coeffs.add_(0.1 * torch.randn_like(tuned.kan.cheby_coeffs))
    x = inputs(dtype=torch.float64)
    torch.testing.assert_close(extract_lotra(model, tuned, r=100)(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_a_chebykan_without_a_buffer_of_degrees():
    """tabkan computes its polynomials by their recurrence."""
    model = base("cheby-kan", torch.float32)
    del model.kan.arange

    class Recurrence(ChebyKANLayer):
        def forward(self, x):
            x = torch.tanh(x)
            values = [torch.ones_like(x), x]
            while len(values) < self.cheby_coeffs.shape[-1]:
                values.append(2 * x * values[-1] - values[-2])
            return torch.einsum("bid,iod->bo", torch.stack(values, -1), self.cheby_coeffs)

    model.kan.__class__ = Recurrence
    tuned, x = copy.deepcopy(model), inputs()
    with torch.no_grad():
        tuned.kan.cheby_coeffs.add_(0.1 * torch.randn_like(tuned.kan.cheby_coeffs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(extract_lotra(model, tuned, r=100)(x), tuned(x), rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_linear_are_not_weighted_by_features(monkeypatch):
    monkeypatch.setitem(registry._SPECS, "broken", registry._SPECS["cheby-kan"])
    register_kan_layer("broken", matches=ChebyKANLayer, coefficients=("cheby_coeffs", "i o k"), linear=False)
    model, x = base("cheby-kan", torch.float64), inputs(dtype=torch.float64)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.kan.cheby_coeffs.add_(0.1 * torch.randn_like(tuned.kan.cheby_coeffs))
    extracted = extract_lotra(model, tuned, r=100, inputs=x)
    assert not extracted.extraction_report.output_errors
    torch.testing.assert_close(extracted(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_a_head_whose_name_a_kan_layer_ends_with():
    """ "1" is the end of "0.layers.1", which PEFT would have copied whole; the base was left half adapted."""
    model = torch.nn.Sequential(KAN([3, 4, 4]), torch.nn.Linear(4, 2))
    tuned, x = copy.deepcopy(model), torch.rand(5, 3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.warns(UserWarning, match=r"also changed 1\.weight, 1\.bias, which a LoTRA adapter cannot hold"):
        extracted = extract_lotra(model, tuned, r=100)
    assert extracted.extraction_report.modules_to_save == []
    torch.testing.assert_close(extracted.base_model.model[0](x), tuned[0](x))
