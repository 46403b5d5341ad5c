# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
import torch
from helpers import adapt, assert_same, snapshot
from torch import Tensor, nn

from peft_lotra import what_changed
from peft_lotra.kan import KAN


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * x[:, :1]


def inputs(columns: int, rows: int = 1000) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_the_shares_are_those_of_the_parts():
    x = inputs(3, 4000)
    a, b, c = x.unbind(1)
    parts = [torch.full_like(a, 0.3), 0.5 * a, b**2 - 1 / 3, a * c]

    report = what_changed(Zero(), x, targets=sum(parts)[:, None])

    total = sum(parts).square().mean()
    expected = [part.square().mean() / total for part in parts]
    shares = [report.constant, report.linear, report.additive, report.rest]
    assert shares == pytest.approx([share.item() for share in expected], abs=0.02)
    assert sum(shares) == pytest.approx(1)
    assert report.pairs[0][:2] == ("input 0", "input 2")
    assert report.pairs[0].share == pytest.approx(report.rest, abs=0.01)
    assert "it needs another unit or a product" in str(report)


def test_a_network_of_one_layer_changes_by_a_sum():
    model = adapt(KAN([2, 1]).double()).double()
    before = snapshot(model)

    report = what_changed(model, inputs(2))

    assert_same(model, before)
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
    noise = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    report = what_changed(Zero(), x, targets=x[:, :1] + 0.5 * noise)

    share = (0.25 * noise.square().mean() / (x[:, :1] + 0.5 * noise).square().mean()).item()
    assert report.rest == pytest.approx(share, abs=0.02)
    assert report.pairs == []


def test_constant_and_binary_columns_are_taken():
    x = inputs(3)
    x[:, 1] = 2.0
    x[:, 2] = (x[:, 2] > 0).double()

    report = what_changed(Zero(), x, targets=x[:, 2:] + x[:, :1] ** 2, names=["a", "b", "c"])

    assert report.rest < 1e-3
    assert "b is constant" in str(report)


@pytest.mark.parametrize(
    "model",
    [
        lambda: adapt(KAN([2, 1]), random=False),
        lambda: KAN([2, 1]),
        lambda: adapt(KAN([2, 1])).merge_and_unload(),
    ],
)
def test_no_change_is_said(model):
    assert "did not change" in str(what_changed(model(), inputs(2).float()))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: what_changed(adapt(KAN([2, 1])), inputs(3).float()), r"The input has shape \(1000, 3\)"),
        (lambda: what_changed(adapt(KAN([2, 1])), inputs(2, 7).float()), "7 rows.*needs more than 14"),
        (lambda: what_changed(adapt(KAN([2, 1])), inputs(2).float() * torch.nan), "NaN"),
        (lambda: what_changed(adapt(KAN([2, 1])), inputs(2).float(), names=["a"]), "longer"),
        (lambda: what_changed(KAN([2, 1]), inputs(2).float(), inputs(2)), "`targets` has shape"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
