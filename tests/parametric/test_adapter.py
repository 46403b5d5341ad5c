# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import family_problems as problems
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, ParametricAdapter
from peft_lotra.kan import KAN, jet


@pytest.fixture(scope="module")
def base():
    return problems.pretrained()


def make(base, log=False, **kwargs):
    return ParametricAdapter(base, problems.terms_of, ranks=6, log=log, **kwargs)


@pytest.fixture(scope="module")
def family(base):
    family = make(base)
    family.fit(between=(2.5, 3.5), max_members=14, progress=False)
    return family


def test_predictions_are_about_as_good_as_members(family):
    unseen = np.random.default_rng(0).uniform(2.5, 3.5, 8)
    ratios, refined, indicators = [], [], []
    for c in unseen:
        prediction = family.predict(c)
        fitted = problems.error(family.refine(c, 8), c)
        ratios.append(problems.error(prediction, c) / fitted)
        refined.append(problems.error(family.refine(c), c) / fitted)
        indicators.append(prediction.indicator)
    assert np.median(ratios) < 2 and np.median(refined) < 1.2
    nearest = min(family.parameters, key=lambda c: abs(c - unseen[0]))
    assert problems.error(family.predict(unseen[0]), unseen[0]) < problems.error(family.predict(nearest), unseen[0])


def test_the_base_is_left_alone(base, family):
    before = copy.deepcopy(base.state_dict())
    make(base).fit([2.9, 3.1], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert type(base) is KAN and all(part.requires_grad for part in base.parameters())


def test_only_cores_move_and_members_are_fitted_again_only_if_asked(base):
    family = make(base)
    assert {name.split(".")[-2] for name, p in family.model.named_parameters() if p.requires_grad} == {"lotra_core"}
    report = family.fit([3.2, 2.8, 3.0, 3.2], progress=False)
    assert family.parameters == [2.8, 3.0, 3.2] and len(report) == 3 and report.as_dict()["coordinates"] == family.size
    assert "3 members of" in str(report) and json.dumps(report.as_dict())
    assert not family.fit([3.0, 2.8], progress=False)
    assert [m.parameter for m in family.fit([2.9, 3.0], progress=False)] == [(2.9,)]
    assert family.parameters == [2.8, 2.9, 3.0, 3.2]


def test_a_prediction_is_a_function_of_its_own(family):
    x = problems.POINTS[::7]
    first, second = family.predict(2.6), family.predict(3.3)
    values = first(x)
    assert not torch.equal(second(x), values) and torch.equal(first(x), values)
    model = family.as_adapter(2.6)
    torch.testing.assert_close(model(x), values)
    for one, other in zip(first.apply(jet, x), jet(model, x), strict=True):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        torch.testing.assert_close(first(x), values)
    assert "2.6" in repr(first) and first.parameter == 2.6 and not first.extrapolated


def test_extrapolation_is_refused(family):
    for call in (family.predict, family.refine, family.as_adapter):
        with pytest.raises(ValueError, match=r"4.5 lies outside of the fitted members \(2.5 to 3.5\).*`force=True`"):
            call(4.5)
    forced = family.predict(4.5, force=True)
    assert forced.extrapolated and forced.indicator > 5 * family.predict(3.4).indicator
    assert family.refine(4.5, 3, force=True).indicator < forced.indicator


def test_an_adapter_is_a_plain_one(family, base, tmp_path):
    x = problems.POINTS
    model = family.as_adapter(2.7, steps=2)
    torch.testing.assert_close(model(x), family.refine(2.7, 2)(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    other = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    other.load_adapter(tmp_path, adapter_name="member")
    other.set_adapter("member")
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(model.merge_and_unload()(x), other(x))


def test_two_parameters(base):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=6)
    report = family.fit(between=((2.8, 0.8), (3.2, 1.2)), max_members=14, progress=False)
    assert len(family.parameters) == len(report) <= 14
    prediction = family.predict((3.05, 1.07))
    truth = 1.07 * problems.exact(3.05)
    u = problems.solution(prediction(problems.POINTS), problems.POINTS)
    assert ((u - truth).norm() / truth.norm()).item() < 0.02
    for parameter in ((3.3, 1.0), (2.9, 0.7)):
        with pytest.raises(ValueError, match="outside"):
            family.predict(parameter)
    with pytest.raises(ValueError, match="2 finite numbers"):
        family.predict(3.0)


def test_logarithmic_parameters(base):
    family = make(base, log=True)
    family.fit([2.0, 2.8, 4.0], progress=False)
    assert np.isfinite(family.predict(2.4).indicator)
    with pytest.raises(ValueError, match="must be above 0"):
        family.predict(-1.0)


def test_a_training_function_instead_of_terms():
    torch.manual_seed(0)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    for part in (base,):
        problems.train_by_adam(part, 3.0)
    family = ParametricAdapter(base, ranks=4, loss_of=problems.loss_of)
    family.fit([2.5, 3.0, 3.5], train=problems.train_by_adam, progress=False)
    before = problems.loss_of(base, 2.75).item()
    assert family.predict(2.75).indicator < before
    with pytest.raises(ValueError, match="no residual terms"):
        family.refine(2.75)


def test_training_without_a_loss_has_no_indicator():
    family = ParametricAdapter(KAN([1, 3, 1]).double(), ranks=2)
    family.fit([2.5, 3.0], train=problems.train_by_adam, progress=False)
    assert np.isnan(family.predict(2.7).indicator)
    with pytest.raises(ValueError, match="`loss_of`"):
        family.fit(between=(2.0, 3.0), train=problems.train_by_adam)


def test_a_wrapper_of_ones_own_and_float32():
    class Solution(nn.Module):
        def __init__(self, kan):
            super().__init__()
            self.kan = kan

        def forward(self, x):
            return (1 - x**2) * self.kan(x)

    def data(model, x, u):
        return model(x) - u

    def terms(c):
        x = problems.POINTS.float()
        return [(data, (x, problems.exact(c).float()))]

    family = ParametricAdapter(Solution(KAN([1, 4, 1])), terms, ranks=4)
    family.fit([2.0, 2.5, 3.0], progress=False)
    prediction = family.predict(2.25)
    assert prediction(problems.POINTS.float()).dtype == torch.float32 and prediction.indicator < 0.3


def test_saving_and_loading(family, base, tmp_path):
    family.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "parametric_adapter.safetensors"]
    assert "for parameters from 2.5 to 3.5" in (tmp_path / "README.md").read_text()
    loaded = ParametricAdapter.from_pretrained(base, tmp_path, problems.terms_of)
    assert loaded.parameters == family.parameters
    for c in (2.5, 2.9):
        torch.testing.assert_close(loaded.predict(c)(problems.POINTS), family.predict(c)(problems.POINTS))
        assert loaded.predict(c).indicator == pytest.approx(family.predict(c).indicator, rel=1e-6)
    loaded.fit([2.9], progress=False)  # and it goes on
    assert len(loaded.parameters) == len(family.parameters) + 1
    assert np.isnan(ParametricAdapter.from_pretrained(base, tmp_path).predict(2.9).indicator)


def test_few_modes_make_a_small_file(family, base, tmp_path):
    family.save_pretrained(tmp_path / "all")
    family.save_pretrained(tmp_path / "few", modes=3)
    sizes = [(tmp_path / name / "parametric_adapter.safetensors").stat().st_size for name in ("all", "few")]
    assert sizes[1] < sizes[0]
    loaded = [ParametricAdapter.from_pretrained(base, tmp_path / name) for name in ("all", "few")]
    exact = family.predict(3.0)(problems.POINTS)
    lost = [(one.predict(3.0)(problems.POINTS) - exact).norm().item() for one in loaded]
    assert lost[0] < 1e-6 * exact.norm().item() < lost[1] < 0.1 * exact.norm().item()


def test_loading_onto_another_base_is_refused(family, base, tmp_path):
    family.save_pretrained(tmp_path)
    other = problems.pretrained(seed=1)
    with pytest.raises(ValueError, match="parametric_adapter|base"):
        ParametricAdapter.from_pretrained(other, tmp_path)
    with pytest.warns(UserWarning):
        ParametricAdapter.from_pretrained(other, tmp_path, check_base="warn")
    with pytest.raises(ValueError):
        ParametricAdapter.from_pretrained(KAN([1, 4, 1], 7, dtype=torch.float64), tmp_path)  # another grid
    with pytest.raises(ValueError, match="no family"):
        ParametricAdapter.from_pretrained(base, tmp_path / "..")


def test_a_family_in_another_process(family, tmp_path):
    family.save_pretrained(tmp_path)
    torch.save(family.predict(2.9)(problems.POINTS).detach(), tmp_path / "values.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); import family_problems as problems\n"
        "from peft_lotra import ParametricAdapter\n"
        "family = ParametricAdapter.from_pretrained(problems.pretrained(), sys.argv[1], check_base='warn')\n"
        "values = torch.load(sys.argv[1] + '/values.pt')\n"
        "assert (family.predict(2.9)(problems.POINTS) - values).abs().max() < 1e-6\n"
    )
    folder = problems.__file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", code, str(tmp_path), folder], check=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Give either `parameters`"),
        ({"parameters": [1.0], "between": (1.0, 2.0)}, "Give either `parameters`"),
        ({"between": (1.0, 2.0, 3.0)}, "lowest, highest"),
        ({"parameters": [1.0], "tolerance": 0.1}, "`tolerance` is 0.1"),
        ({"between": (1.0, 2.0), "tolerance": -1.0}, "`tolerance` is -1.0"),
        ({"parameters": [1.0], "steps": 0}, "`steps` is 0"),
        ({"parameters": [1.0], "steps": 5, "max_steps": 4}, "`max_steps` is 4"),
        ({"parameters": [1.0], "max_members": True}, "`max_members`"),
        ({"between": (1.0, 2.0), "max_members": 1}, "`max_members` is 1, but the corners alone .* are 2 members"),
        ({"between": ((1.0, 1.0), (2.0, 2.0)), "max_members": 3}, "a range of 2 parameters are 4 members"),
        ({"parameters": []}, "one or more"),
        ({"parameters": [1.0, (1.0, 2.0)]}, "of one dimension"),
        ({"parameters": ["a"]}, "finite numbers"),
        ({"parameters": [float("nan")]}, "finite numbers"),
        ({"parameters": ["1.5"]}, "finite numbers"),
        ({"parameters": [10**400]}, "finite numbers"),
        ({"between": (1.0, 1.0)}, "lowest, highest"),
        ({"between": (1.0, 2.0), "tolerance": "x"}, "`tolerance` is 'x'"),
        ({"parameters": [1.0], "train": problems.train_by_adam}, "give one of them"),
    ],
)
def test_wrong_arguments_of_fit(base, arguments, message):
    family = make(base)
    with pytest.raises(ValueError, match=message):
        family.fit(**arguments, progress=False)
    assert family.parameters == []


@pytest.mark.parametrize(
    "arguments",
    [{"parameters": 5}, {"parameters": "12"}, {"parameters": b"12"}, {"between": 5}, {"executor": 3}, {"folder": 3}],
    ids=str,
)
def test_arguments_of_fit_of_another_kind(base, arguments):
    """Text was read letter by letter: "12" fitted members at 1 and 2."""
    family = make(base)
    with pytest.raises(TypeError, match=f"`{next(iter(arguments))}` is"):
        family.fit(**{"parameters": None if "between" in arguments else [1.0]} | arguments, progress=False)
    assert family.parameters == []


@pytest.mark.parametrize("log", ["x", 1, None, [], [1]], ids=repr)
def test_log_that_is_no_flag(base, log):
    with pytest.raises(ValueError, match="`log` is"):
        make(base, log)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan, self.head = KAN([1, 4, 3]), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.kan(x))


def test_what_no_family_can_have(base):
    """Modules that are saved whole started from zero, and the adapter of a model was dropped."""
    with pytest.raises(ValueError, match=r"`modules_to_save` \(head\)"):
        ParametricAdapter(Headed(), problems.terms_of, config=LoTRAConfig(r=2, modules_to_save=["head"]))
    adapted = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="`base` has adapters already"):
            make(model)
    with pytest.raises(TypeError, match="`config` is of type int"):
        make(base, config=3)


@pytest.mark.parametrize("wrong", ["base", "statistics"])
def test_training_that_changes_what_members_share(wrong):
    """The base was another one afterwards, for all members."""

    def train(model, c):
        if wrong == "statistics":
            for module in model.modules():  # `model.train()` would not, since norms of a base are frozen
                module.training = True
            model(torch.rand(20, 1) + 5)
        else:
            model.requires_grad_(True)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)

    norm = nn.BatchNorm1d(1)
    family = ParametricAdapter(nn.Sequential(KAN([1, 4, 1]), norm), ranks=2)
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items() if "lotra" not in name}
    with pytest.raises(RuntimeError, match="`train` changed .*, which all members of the family share"):
        family.fit([1.0, 2.0], train=train, progress=False)
    assert all(torch.equal(family.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[-2] for name, p in family.model.named_parameters() if p.requires_grad} == {"lotra_core"}


def test_training_that_leaves_dropout_on():
    """Predictions were random then."""
    family = ParametricAdapter(nn.Sequential(KAN([1, 4, 4]), nn.Dropout(0.5)), ranks=2)
    family.fit([1.0, 2.0], train=lambda model, c: model.train(), progress=False)
    x, prediction = torch.rand(9, 1), family.predict(1.5)
    assert torch.equal(prediction(x), prediction(x))


def test_other_wrong_arguments(base, tmp_path):
    with pytest.raises(TypeError, match="`base`"):
        ParametricAdapter(problems.terms_of, problems.terms_of)
    with pytest.raises(TypeError, match="`terms_of`"):
        ParametricAdapter(base, problems.terms_of(1.0))
    with pytest.raises(ValueError, match="not linear in them"):
        ParametricAdapter(base, problems.terms_of, config=LoTRAConfig(train=["core", "factor_in"]))
    family = make(base)
    with pytest.raises(ValueError, match="no members yet"):
        family.predict(3.0)
    with pytest.raises(ValueError, match="no members yet"):
        family.save_pretrained(tmp_path)
    family.fit([3.0], progress=False)
    with pytest.raises(ValueError, match="`modes` is 0"):
        family.save_pretrained(tmp_path, modes=0)
    for steps in (0, True, "x", 1.0):
        with pytest.raises(ValueError, match="`steps` is"):
            family.refine(3.0, steps)
    for steps in (-1, None, 0.0):
        with pytest.raises(ValueError, match="`steps` is"):
            family.as_adapter(3.0, steps=steps)
    for folder in (3, None):
        with pytest.raises(TypeError, match="`folder` is"):
            family.save_pretrained(folder)
        with pytest.raises(TypeError, match="`folder` is"):
            ParametricAdapter.from_pretrained(base, folder)
    for parameter in ("3.0", b"3.0", 10**400, torch.tensor(3.0, device="meta")):
        with pytest.raises(ValueError, match="finite numbers"):
            family.predict(parameter)
    assert family.predict(3.0).indicator < 1


def test_a_function_that_fails_at_one_parameter(base):
    family = ParametricAdapter(base, problems.terms_that_fail, ranks=6)
    with pytest.warns(RuntimeWarning, match="2.6: ZeroDivisionError: no solution here"):
        report = family.fit([2.4, 2.6, 2.8, 3.0], progress=False)
    assert family.parameters == [2.4, 2.8, 3.0] and list(report.failed) == [2.6]
    alone = ParametricAdapter(base, problems.terms_that_fail, ranks=6)
    with pytest.raises(RuntimeError, match="2.6: ZeroDivisionError"):
        alone.fit([2.6], progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fitting_without_grad_mode(base, mode):
    expected = make(base)
    expected.fit([2.9, 3.0], progress=False)
    with mode():
        family = make(base)
        family.fit([2.9, 3.0], progress=False)
        refined, adapter = family.refine(2.95), family.as_adapter(2.95)
    np.testing.assert_array_equal(family._path.vectors, expected._path.vectors)
    assert refined.indicator == pytest.approx(expected.refine(2.95).indicator)
    adapter(problems.POINTS).sum().backward()


@pytest.mark.filterwarnings("ignore:Step refused")
def test_residuals_that_cannot_be_fitted(base):
    def averaged(model, x):
        return model(x).mean()

    def broken(model, x):
        return model(x) * torch.nan

    for function, words in (
        (averaged, r"residual term 0 \(averaged\) returns \(\) for 60 rows"),
        (broken, "NaN or inf"),
    ):
        with pytest.raises(RuntimeError, match=f"3.0: ValueError: .*{words}"):
            ParametricAdapter(base, lambda c, f=function: [(f, problems.POINTS)], ranks=4).fit([3.0], progress=False)


def test_a_copied_family_goes_on(family):
    other = pickle.loads(pickle.dumps(copy.deepcopy(family)))
    assert other.predict(2.9).indicator == pytest.approx(family.predict(2.9).indicator)
