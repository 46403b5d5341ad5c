# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that are fitted at given parameters to terms, or by a function that trains, and their predictions."""

from __future__ import annotations

import copy
import json
import pickle

import family_problems as problems
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, ParametricAdapter
from peft_lotra.kan import KAN, jet


def make(base, log=False, **kwargs):
    return ParametricAdapter(base, problems.terms_of, ranks=6, log=log, **kwargs)


def test_predictions_are_better_than_members_nearby_and_one_step_as_good_as_eight(family):
    predicted, refined = [], []
    for c in np.random.default_rng(0).uniform(2.5, 3.5, 8).tolist():
        nearest = min(family.parameters, key=lambda fitted: abs(fitted - c))
        predicted.append(problems.error(family.predict(c), c) / problems.error(family.predict(nearest), c))
        refined.append(problems.error(family.refine(c), c) / problems.error(family.refine(c, 8), c))

    assert np.median(predicted) < 0.5
    assert np.median(refined) < 3


def test_the_base_is_left_alone_and_only_cores_move(base):
    before, family = copy.deepcopy(base.state_dict()), make(base)
    frozen = {name: part.clone() for name, part in family.model.state_dict().items() if "lotra_core" not in name}
    family.fit([2.9, 3.1], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert type(base) is KAN and all(part.requires_grad for part in base.parameters())
    assert all(torch.equal(family.model.state_dict()[name], part) for name, part in frozen.items())
    assert family.size == sum(part.numel() for name, part in family.model.named_parameters() if "core" in name)


def test_members_are_fitted_once(base):
    family = make(base)
    report = family.fit([3.2, 2.8, 3.0, 3.2], progress=False)
    assert family.parameters == [2.8, 3.0, 3.2] and len(report) == 3 and report.as_dict()["coordinates"] == family.size
    assert "3 members of" in str(report) and json.dumps(report.as_dict())
    assert not family.fit([3.0, 2.8], progress=False)
    assert [m.parameter for m in family.fit([2.9, 3.0], progress=False)] == [(2.9,)]
    assert family.parameters == [2.8, 2.9, 3.0, 3.2]


def test_the_first_member_is_where_the_base_is(base):
    order = []
    family = ParametricAdapter(base, lambda c: order.append(c) or problems.terms_of(c), ranks=4)
    family.fit([2.6, 2.8, 3.0, 3.2], progress=False)
    assert order[:4] == [2.6, 2.8, 3.0, 3.2] and order[4] == 3.0  # the losses of the base, and then the first fit


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


def test_extrapolation_is_refused_unless_forced(family):
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
    torch.testing.assert_close(model.merge_and_unload()(x), loaded(x))


def test_two_parameters(base):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=6)
    report = family.fit(between=((2.8, 0.8), (3.2, 1.2)), max_members=9, progress=False)
    assert len(family.parameters) == len(report) == 9
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
    family, plain = make(base, log=True), make(base)
    for one in (family, plain):
        one.fit([2.0, 2.8, 4.0], progress=False)
    assert problems.error(family.predict(2.4), 2.4) != problems.error(plain.predict(2.4), 2.4)
    with pytest.raises(ValueError, match="above 0 with `log=True`"):
        family.predict(-1.0)
    with pytest.raises(ValueError, match="2 finite numbers"):
        make(base, log=[True, False]).fit([2.0], progress=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Give either `parameters`"),
        ({"between": ((1.0, 1.0), (2.0, 2.0)), "max_members": 3}, "`max_members` is 3, .* at least 4"),
        ({"parameters": []}, "at least one parameter"),
        ({"parameters": [float("nan")]}, "must be a finite number"),
        ({"parameters": "29"}, "parameter is '2', but must be"),
        ({"parameters": ["2.9", "3.0"]}, "parameter is '2.9', but must be"),
        ({"parameters": [1j]}, "parameter is 1j, but must be"),
        ({"between": ("a", "b")}, "parameter is 'a', but must be"),
        ({"parameters": [1.0], "train": problems.train_by_adam}, "Give `terms_of` to the constructor, or `train`"),
    ],
)
def test_wrong_arguments_of_fit(base, arguments, message):
    family = make(base)
    with pytest.raises(ValueError, match=message):
        family.fit(**arguments, progress=False)
    assert family.parameters == []


@pytest.mark.parametrize("arguments", [{"parameters": 3.0}, {"parameters": torch.tensor(3.0)}, {"between": 3}])
def test_one_number_is_no_list_of_parameters(base, arguments):
    with pytest.raises(TypeError, match="iter"):
        make(base).fit(**arguments, progress=False)


FUNCTIONS = {
    "terms_of": lambda c: None,
    "held_terms_of": lambda c: None,
    "solution_of": lambda network, c: None,
    "loss_of": lambda network, c: None,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_without_a_result_are_refused(base, name):
    family = ParametricAdapter(base, **{"terms_of": problems.terms_of, name: FUNCTIONS[name]})
    with pytest.raises(RuntimeError, match="2.9: TypeError: .*None"):
        family.fit([2.9, 3.0], progress=False)
    assert family.parameters == []


@pytest.mark.parametrize("result", [None, 1j, 1], ids=["None", "complex", "integer"])
def test_residuals_that_are_no_real_numbers_are_named(base, result):
    def residual(model, x):
        return None if result is None else (result * model(x) if result == 1j else model(x).long())

    family = ParametricAdapter(base, lambda c: [(residual, problems.POINTS)], ranks=4)
    with pytest.raises(RuntimeError, match=r"residual term 0 \(residual\) returns"):
        family.fit([3.0], progress=False)


def test_predictions_at_what_is_no_number_are_refused(family):
    for wrong in ("3.0", 3.0 + 1j, None):
        with pytest.raises(ValueError, match="parameter is .* must be a finite number"):
            family.predict(wrong)


def test_wrong_arguments_of_the_constructor(base):
    adapted = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="`base` has adapters: merge them first"):
            make(model)


def test_a_family_without_members(base, tmp_path):
    for call in (lambda: make(base).predict(3.0), lambda: make(base).save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="no members yet"):
            call()


def test_a_function_that_fails_at_one_parameter(base):
    family = ParametricAdapter(base, problems.terms_that_fail, ranks=6)
    with pytest.warns(RuntimeWarning, match="2.6: ZeroDivisionError: no solution here"):
        report = family.fit([2.4, 2.6, 2.8, 3.0], progress=False)
    assert family.parameters == [2.4, 2.8, 3.0] and list(report.failed) == [2.6]
    assert "failed: 2.6: ZeroDivisionError" in str(report) and "2.6" in report.as_dict()["failed"]
    with pytest.raises(RuntimeError, match="2.6: ZeroDivisionError"):
        ParametricAdapter(base, problems.terms_that_fail, ranks=6).fit([2.6], progress=False)


@pytest.mark.filterwarnings("ignore:Step refused")
def test_residuals_that_cannot_be_fitted(base):
    def averaged(model, x):
        return model(x).mean()

    def broken(model, x):
        return model(x) * torch.nan

    for function, words in ((averaged, "averaged"), (broken, "NaN or inf")):
        with pytest.raises(RuntimeError, match=f"3.0: ValueError: .*{words}"):
            ParametricAdapter(base, lambda c, f=function: [(f, problems.POINTS)], ranks=4).fit([3.0], progress=False)


def test_fitting_in_inference_mode(base):
    x, expected = problems.POINTS, make(base)
    expected.fit([2.9, 3.0], progress=False)
    with torch.inference_mode():
        family = make(base)
        family.fit([2.9, 3.0], progress=False)
        refined, adapter = family.refine(2.95), family.as_adapter(2.95)
    assert torch.equal(family.predict(2.93)(x), expected.predict(2.93)(x))
    assert refined.indicator == pytest.approx(expected.refine(2.95).indicator)
    adapter(x).sum().backward()


def test_a_copied_family_goes_on(family):
    other = pickle.loads(pickle.dumps(copy.deepcopy(family)))
    assert other.predict(2.9).indicator == pytest.approx(family.predict(2.9).indicator)


def test_a_training_function_instead_of_terms():
    torch.manual_seed(0)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    problems.train_by_adam(base, 3.0)
    family = ParametricAdapter(base, ranks=4, loss_of=problems.loss_of)
    family.fit([2.5, 3.0, 3.5], train=problems.train_by_adam, progress=False)
    prediction = family.predict(2.75)
    assert prediction.indicator < problems.loss_of(base, 2.75).item() and np.isnan(prediction.residual)
    assert prediction.indicator == pytest.approx(prediction.apply(problems.loss_of, 2.75).item())
    with pytest.raises(ValueError, match="no residual terms"):
        family.refine(2.75)


def test_training_without_a_loss_has_no_indicator():
    family = ParametricAdapter(KAN([1, 3, 1]).double(), ranks=2)
    family.fit([2.5, 3.0], train=problems.train_by_adam, progress=False)
    assert np.isnan(family.predict(2.7).indicator)
    with pytest.raises(ValueError, match="`loss_of`"):
        family.fit(between=(2.0, 3.0), train=problems.train_by_adam)


def test_training_that_changes_what_members_share():
    """Modes, flags, running statistics and the base stay as they were."""

    def train(model, c):
        model.train().requires_grad_(True)
        for module in model.modules():
            module.training = True
        model(torch.rand(20, 1) + 5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(c)

    torch.manual_seed(0)
    family = ParametricAdapter(nn.Sequential(KAN([1, 4, 1]), nn.BatchNorm1d(1), nn.Dropout(0.5)), ranks=2)
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items() if "lotra_core" not in name}
    family.fit([1.0, 2.0], train=train, progress=False)
    assert all(torch.equal(family.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all("lotra_core" in name for name, part in family.model.named_parameters() if part.requires_grad)
    x, prediction = torch.rand(9, 1), family.predict(1.5)
    assert torch.equal(prediction(x), prediction(x))  # without dropout
    assert any(part.any() for name, part in family.as_adapter(2.0).named_parameters() if "lotra_core" in name)
