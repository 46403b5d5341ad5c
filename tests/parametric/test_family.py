# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that are fitted at given parameters to terms, or by a function that trains, and their predictions."""

import copy
import json
import pickle

import family_problems as problems
import numpy as np
import pytest
import torch
from helpers import refused
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, ParametricAdapter
from peft_lotra.kan import KAN, jet


def make(base, log=False, **kwargs):
    return ParametricAdapter(base, problems.terms_of, ranks=6, log=log, **kwargs)


def shared_state(family):
    """Return what members share: all tensors but the cores."""
    state = family.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if "lotra_core" not in name}


def test_predictions_are_better_than_members_nearby_and_one_step_as_good_as_eight(family):
    predicted, refined = [], []
    for c in np.random.default_rng(0).uniform(2.5, 3.5, 8).tolist():
        nearest = min(family.parameters, key=lambda fitted: abs(fitted - c))
        predicted.append(problems.error(family.predict(c), c) / problems.error(family.predict(nearest), c))
        refined.append(problems.error(family.refine(c), c) / problems.error(family.refine(c, 8), c))

    assert np.median(predicted) < 0.5
    assert np.median(refined) < 3


def test_the_base_is_left_alone_and_only_cores_move(base):
    family = make(base)
    base_state = copy.deepcopy(base.state_dict())
    shared = shared_state(family)

    family.fit([2.9, 3.1], progress=False)

    assert type(base) is KAN
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert_close(base.state_dict(), base_state, rtol=0, atol=0)
    assert_close(shared_state(family), shared, rtol=0, atol=0)
    cores = [parameter for name, parameter in family.model.named_parameters() if "lotra_core" in name]
    assert family.size == sum(core.numel() for core in cores)


def test_members_are_fitted_once(base):
    family = make(base)

    report = family.fit([3.2, 2.8, 3.0, 3.2], progress=False)
    same = family.fit([3.0, 2.8], progress=False)
    (member,) = family.fit([2.9, 3.0], progress=False)

    assert len(report) == 3
    assert not same
    assert member.parameter == (2.9,)
    assert family.parameters == [2.8, 2.9, 3.0, 3.2]
    assert "3 members of" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["coordinates"] == family.size


def test_the_first_member_is_where_the_base_is(base):
    order = []

    def terms_of(c):
        order.append(c)
        return problems.terms_of(c)

    ParametricAdapter(base, terms_of, ranks=4).fit([2.6, 2.8, 3.0, 3.2], progress=False)

    assert order[:5] == [2.6, 2.8, 3.0, 3.2, 3.0]  # the losses of the base, and then the first fit


def test_a_prediction_is_a_function_that_later_predictions_do_not_change(family):
    x = problems.POINTS[::7]
    first = family.predict(2.6)
    values = first(x)

    second = family.predict(3.3)

    assert not torch.equal(second(x), values)
    assert torch.equal(first(x), values)
    with torch.inference_mode():
        assert_close(first(x), values)
    assert first.parameter == 2.6
    assert not first.extrapolated
    assert "2.6" in repr(first)


def test_a_prediction_has_the_values_and_the_jet_of_its_adapter(family):
    x = problems.POINTS[::7]
    prediction, model = family.predict(2.6), family.as_adapter(2.6)

    assert_close(prediction(x), model(x))
    assert_close(prediction.apply(jet, x), jet(model, x))


@pytest.mark.parametrize("method", ["predict", "refine", "as_adapter"])
def test_extrapolation_is_refused_unless_forced(family, method):
    with refused(r"4.5 lies outside of the fitted members \(2.5 to 3.5\).*`force=True`"):
        getattr(family, method)(4.5)


def test_the_indicator_of_a_forced_extrapolation_is_large(family):
    forced = family.predict(4.5, force=True)

    assert forced.extrapolated
    assert forced.indicator > 5 * family.predict(3.4).indicator
    assert family.refine(4.5, 3, force=True).indicator < forced.indicator


def test_a_parameter_next_to_a_member_gets_none(base):
    x = problems.POINTS
    family = make(base)
    family.fit([2.6, 2.8, 3.0, 3.2], progress=False)
    before = family.predict(2.7)(x)

    with pytest.warns(RuntimeWarning, match="3.0005: it is too near to 3.0, whose member serves both"):
        report = family.fit([3.0005, 3.4], progress=False)

    assert family.parameters == [2.6, 2.8, 3.0, 3.2, 3.4]
    assert list(report.failed) == [3.0005]
    assert (family.predict(2.7)(x) - before).norm() < 0.01 * before.norm()


def test_an_adapter_is_a_plain_one(family, base, tmp_path):
    x = problems.POINTS

    model = family.as_adapter(2.7, steps=2)
    y = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)

    assert_close(y, family.refine(2.7, 2)(x))
    assert_close(loaded(x), y)
    assert_close(model.merge_and_unload()(x), y)


def test_a_family_has_two_parameters(base):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=6)

    report = family.fit(between=((2.8, 0.8), (3.2, 1.2)), max_members=9, progress=False)

    assert len(family.parameters) == len(report) == 9
    prediction = family.predict((3.05, 1.07))
    u = problems.solution(prediction(problems.POINTS), problems.POINTS)
    exact = 1.07 * problems.exact(3.05)
    assert (u - exact).norm() < 0.02 * exact.norm()
    for outside in ((3.3, 1.0), (2.9, 0.7)):
        with refused("outside"):
            family.predict(outside)
    with refused("2 finite numbers"):
        family.predict(3.0)


def test_a_logarithmic_parameter_changes_predictions_and_is_positive(base):
    linear, logarithmic = make(base), make(base, log=True)
    for family in (linear, logarithmic):
        family.fit([2.0, 2.8, 4.0], progress=False)

    assert problems.error(logarithmic.predict(2.4), 2.4) != problems.error(linear.predict(2.4), 2.4)
    with refused("above 0 with `log=True`"):
        logarithmic.predict(-1.0)


def test_a_list_of_scales_needs_as_many_parameters(base):
    with refused("2 finite numbers"):
        make(base, log=[True, False]).fit([2.0], progress=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Give either `parameters`"),
        ({"between": ((1.0, 1.0), (2.0, 2.0)), "max_members": 3}, "`max_members` is 3, .* at least 4"),
        ({"parameters": []}, "at least one parameter"),
        ({"parameters": [float("nan")]}, "must be a finite number"),
        ({"parameters": 3.0}, "`parameters` is 3.0, but must be"),
        ({"parameters": torch.tensor(3.0)}, "`parameters` is .*3.*, but must be"),
        ({"between": 3}, "`between` is 3, but must be"),
        ({"parameters": [3.0, (1.0, 2.0)]}, "A parameter is .*, but must be .*finite number"),
        ({"parameters": [(1.0, 2.0), (1.0, 2.0, 3.0)]}, "A parameter is .*, but must be .*finite number"),
        ({"parameters": [(1.0, 2.0), 3.0]}, "A parameter is .*, but must be .*finite number"),
        ({"parameters": [()]}, "A parameter is .*, but must be .*finite number"),
        ({"parameters": "29"}, "parameter is '2', but must be"),
        ({"between": ("a", "b")}, "parameter is 'a', but must be"),
        ({"between": (1.0, 2.0, 3.0)}, "`between` is"),
        ({"between": (1.0, 2.0), "tolerance": -1.0}, "`tolerance` is -1.0"),
        ({"parameters": [1.0], "max_steps": -1}, "`max_steps` is -1"),
        ({"parameters": [1.0], "train": problems.train_by_adam}, "Give `terms_of` to the constructor, or `train`"),
    ],
)
def test_wrong_arguments_of_fit_are_refused(base, arguments, message):
    family = make(base)

    with refused(message):
        family.fit(**arguments, progress=False)

    assert family.parameters == []


@pytest.mark.parametrize("parameter", ["3.0", 3.0 + 1j, None])
def test_predictions_at_what_is_no_number_are_refused(family, parameter):
    with refused("parameter is .* must be a finite number"):
        family.predict(parameter)


def test_a_base_with_adapters_is_refused(base):
    adapted = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))

    for model in (adapted, adapted.base_model.model):
        with refused("`base` has adapters: merge them first"):
            make(model)


WITHOUT_MEMBERS = {
    "predict": lambda family, folder: family.predict(3.0),
    "calibrate": lambda family, folder: family.calibrate(lambda model: model(problems.POINTS)),
    "save": lambda family, folder: family.save_pretrained(folder),
}


@pytest.mark.parametrize("name", WITHOUT_MEMBERS)
def test_a_family_without_members_is_refused(base, tmp_path, name):
    with refused("no members yet"):
        WITHOUT_MEMBERS[name](make(base), tmp_path)


def test_a_function_that_fails_at_one_parameter_leaves_the_other_members(base):
    family = ParametricAdapter(base, problems.terms_that_fail, ranks=6)

    with pytest.warns(RuntimeWarning, match="2.6: ZeroDivisionError: no solution here"):
        report = family.fit([2.4, 2.6, 2.8, 3.0], progress=False)

    assert family.parameters == [2.4, 2.8, 3.0]
    assert list(report.failed) == [2.6]
    assert "failed: 2.6: ZeroDivisionError" in str(report)
    assert "2.6" in report.as_dict()["failed"]


def terms_with(residual):
    return {"terms_of": lambda c: [(residual, problems.POINTS)]}


UNFIT = {
    "without terms": ({"terms_of": lambda c: None}, "TypeError: .*None"),
    "without held-out terms": ({"held_terms_of": lambda c: None}, "TypeError: .*None"),
    "without a solution": ({"solution_of": lambda network, c: None}, "TypeError: .*None"),
    "without a loss": ({"loss_of": lambda network, c: None}, "TypeError: .*None"),
    "an error": ({"terms_of": problems.terms_that_fail}, "ZeroDivisionError"),
    "without residuals": (terms_with(lambda model, x: None), r"residual term 0 \(.*\) returns NoneType"),
    "NaN": (terms_with(lambda model, x: model(x) * torch.nan), "NaN or inf"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.filterwarnings("ignore:Step refused")
def test_functions_that_fail_at_all_parameters_are_named(base, name):
    functions, message = UNFIT[name]
    family = ParametricAdapter(base, **{"terms_of": problems.terms_of, **functions}, ranks=4)

    with pytest.raises(RuntimeError, match=f"2.6: .*{message}"):
        family.fit([2.6], progress=False)

    assert family.parameters == []


def test_a_family_is_fitted_in_inference_mode(base):
    expected = make(base)
    expected.fit([2.9, 3.0], progress=False)

    with torch.inference_mode():
        family = make(base)
        family.fit([2.9, 3.0], progress=False)
        refined, adapter = family.refine(2.95), family.as_adapter(2.95)

    x = problems.POINTS
    assert torch.equal(family.predict(2.93)(x), expected.predict(2.93)(x))
    assert refined.indicator == pytest.approx(expected.refine(2.95).indicator)
    adapter(x).sum().backward()


def test_a_copied_or_pickled_family_predicts_the_same(family):
    copied = pickle.loads(pickle.dumps(copy.deepcopy(family)))

    assert copied.predict(2.9).indicator == pytest.approx(family.predict(2.9).indicator)


def test_a_training_function_and_a_loss_replace_terms():
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    problems.train_by_adam(base, 3.0)
    family = ParametricAdapter(base, ranks=4, loss_of=problems.loss_of)
    family.fit([2.5, 3.0, 3.5], train=problems.train_by_adam, progress=False)

    prediction = family.predict(2.75)

    assert prediction.indicator < problems.loss_of(base, 2.75).item()
    assert prediction.indicator == pytest.approx(prediction.apply(problems.loss_of, 2.75).item())
    assert np.isnan(prediction.residual)
    with refused("no residual terms"):
        family.refine(2.75)


def test_training_without_a_loss_has_no_indicator_and_searches_no_range():
    family = ParametricAdapter(KAN([1, 3, 1]).double(), ranks=2)
    family.fit([2.5, 3.0], train=problems.train_by_adam, progress=False)

    assert np.isnan(family.predict(2.7).indicator)
    with refused("`loss_of`"):
        family.fit(between=(2.0, 3.0), train=problems.train_by_adam)


@pytest.mark.filterwarnings("ignore:Most inputs of .* lie far outside")
def test_training_cannot_change_what_members_share():
    """Flags, running statistics and the base stay as they were, and a prediction runs without dropout."""

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
    shared = shared_state(family)

    family.fit([1.0, 2.0], train=train, progress=False)

    assert_close(shared_state(family), shared, rtol=0, atol=0)
    for name, parameter in family.model.named_parameters():
        assert parameter.requires_grad == ("lotra_core" in name)
    cores = [parameter for name, parameter in family.as_adapter(2.0).named_parameters() if "lotra_core" in name]
    assert any(core.any() for core in cores)
    x, prediction = torch.rand(9, 1), family.predict(1.5)
    assert torch.equal(prediction(x), prediction(x))
