# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import math

import pytest
import torch
from helpers import adapt, assert_same, snapshot
from torch import nn

from peft_lotra import what_changed
from peft_lotra.kan import KAN


class Zero(nn.Module):
    def forward(self, x):
        return 0 * x[:, :1]


def inputs(columns, rows=1000):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_shares_of_constant_linear_additive_and_joint_components():
    x = inputs(3, 4000)
    a, b, c = x.unbind(1)
    components = [torch.full_like(a, 0.3), 0.5 * a, b**2 - 1 / 3, a * c]
    change = sum(components)

    report = what_changed(Zero(), x, targets=change[:, None])

    expected = [component.square().mean() / change.square().mean() for component in components]
    shares = [report.constant, report.linear, report.additive, report.rest]
    assert shares == pytest.approx([share.item() for share in expected], abs=0.02)
    assert sum(shares) == pytest.approx(1)
    assert report.pairs[0][:2] == ("input 0", "input 2")
    assert report.pairs[0].share == pytest.approx(report.rest, abs=0.01)
    assert "It needs hidden units or products of inputs." in str(report)


def test_shares_of_inputs_are_what_leaving_them_out_loses():
    x = inputs(3, 4000)
    a, b, _ = x.unbind(1)
    components = [a, b**2 - 1 / 3]
    change = sum(components)

    report = what_changed(Zero(), x, targets=change[:, None], names=["a", "b", "c"])

    shares = {name: share for name, share in report.inputs}
    expected = [component.square().mean() / change.square().mean() for component in components]
    assert list(shares) == ["a", "b"]
    assert list(shares.values()) == pytest.approx([share.item() for share in expected], abs=0.03)
    assert "explained only by a function of a, linear or not" in str(report)


def test_inputs_that_repeat_each_other_lose_nothing_when_left_out():
    x = inputs(2)
    x = torch.cat([x, x[:, 1:]], 1)
    change = x[:, :1] + x[:, 1:2] ** 2

    report = what_changed(Zero(), x, targets=change)

    assert [name for name, _ in report.inputs] == ["input 0"]


def test_a_network_of_one_layer_changes_by_a_sum():
    model = adapt(KAN([2, 1]).double()).double()
    state = snapshot(model)

    report = what_changed(model, inputs(2))

    assert_same(model, state)
    assert report.rest < 1e-3
    assert "The change is a sum of functions of one input." in str(report)


def test_what_the_data_ask_for_is_more_than_the_adapter_can_do():
    base = KAN([2, 1]).double()
    x = inputs(2)
    with torch.no_grad():
        y = base(x) + 0.3 * torch.sin(math.pi * x[:, :1]) + 0.4 * x[:, :1] * x[:, 1:]

    report = what_changed(base, x, targets=y, names=["voltage", "current"])

    assert report.rest == pytest.approx(0.16 / 9 / (0.16 / 9 + 0.045), abs=0.03)
    assert report.pairs[0][:2] == ("voltage", "current")


def test_noise_is_no_pair():
    x = inputs(4)
    noise = 0.5 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = x[:, :1] + noise

    report = what_changed(Zero(), x, targets=targets)

    share = noise.square().mean() / targets.square().mean()
    assert report.rest == pytest.approx(share.item(), abs=0.02)
    assert report.pairs == []


def test_constant_and_binary_columns_are_taken():
    x = inputs(3)
    x[:, 1] = 2.0
    x[:, 2] = (x[:, 2] > 0).double()

    report = what_changed(Zero(), x, targets=x[:, 2:] + x[:, :1] ** 2, names=["a", "b", "c"])

    assert report.rest < 1e-3
    assert "b is constant" in str(report)


UNCHANGED = {
    "a new adapter": lambda: adapt(KAN([2, 1]), random=False),
    "no adapter": lambda: KAN([2, 1]),
    "a merged adapter": lambda: adapt(KAN([2, 1])).merge_and_unload(),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_report_says_that_nothing_changed(name):
    report = str(what_changed(UNCHANGED[name](), inputs(2).float()))

    assert "did not change: no adapter is active" in report
    assert "The change is a sum" not in report


@pytest.mark.parametrize(
    "columns, rows, options, message",
    [
        (3, 1000, {}, r"The input has shape \(1000, 3\)"),
        (2, 7, {}, "7 rows.*needs more than 14"),
        (2, 1000, {"names": ["a"]}, "`names` has 1 entries, but `inputs` has 2 columns"),
        (2, 1000, {"targets": inputs(2, 10)}, "`targets` has 10 rows"),
        (2, 1000, {"targets": inputs(2)}, "`targets` has shape"),
        (2, 1000, {"targets": inputs(1) * torch.nan}, "NaN"),
    ],
)
def test_wrong_arguments_are_named(columns, rows, options, message):
    with pytest.raises(ValueError, match=message):
        what_changed(adapt(KAN([2, 1])), inputs(columns, rows).float(), **options)


def test_targets_of_one_output_need_no_column():
    base, x = KAN([2, 1]).double(), inputs(2)

    report = what_changed(base, x, targets=x[:, 0])

    assert str(report) == str(what_changed(base, x, targets=x[:, :1]))


def test_long_tails_are_functions_of_one_input_too():
    x = torch.exp(torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    report = what_changed(Zero(), x, targets=torch.sin(x[:, :1]))

    assert report.rest < 0.02


def test_merged_adapters_stay_merged():
    model = adapt(KAN([2, 5, 1]))
    x = inputs(2).float()
    model.merge_adapter()
    expected = model(x)

    what_changed(model, x, targets=expected + x[:, :1])

    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class Noisy(nn.Sequential):
    """A network that draws noise in evaluation mode too."""

    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


def test_the_global_generator_stays():
    model = adapt(Noisy(KAN([2, 5, 1])))
    x = inputs(2).float()
    state = torch.random.get_rng_state()

    what_changed(model, x)

    assert torch.equal(torch.random.get_rng_state(), state)
