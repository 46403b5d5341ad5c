# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import points
from torch import Tensor

from peft_lotra.derivatives.layers import contract_updates, evaluate_layer, jet_rows
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.kan import KANLinear
from peft_lotra.tucker import Tucker, Update


WEIGHTS = [None, torch.tensor([1.0, -2.0], dtype=torch.float64)]


def update(scale: float = 0.7) -> Update:
    shapes = ((2, 3, 4), (5, 2), (3, 3), (9, 4))
    return Update(scale, Tucker(*(torch.randn(shape, dtype=torch.float64) for shape in shapes)))


def inputs(rows: int, weights: Tensor | None) -> tuple:
    second = torch.randn(2 if weights is None else 1, rows, 3, dtype=torch.float64)
    return [points(rows), torch.randn(2, rows, 3, dtype=torch.float64), second], 2, weights


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", [2, 100])  # in factored form, dense
def test_an_update_is_added_to_the_coefficients(rows, weights):
    (stage,) = stages_of(KANLinear(3, 5, dtype=torch.float64))
    added = update()
    dense = added.dense()
    summed = stage._replace(dense=(stage.dense[0] + dense[..., :-1], stage.dense[1] + dense[..., -1]))
    arguments = inputs(rows, weights)
    found = evaluate_layer(stage._replace(updates=(added,)), *arguments)
    for a, e in zip(found, evaluate_layer(summed, *arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("rows", [5, 300])
def test_jet_rows_times_the_coefficients_are_the_jet(rows, order, outputs, weights):
    (stage,) = stages_of(KANLinear(3, outputs, spline_order=order, dtype=torch.float64))
    arguments = inputs(rows, weights)
    phi = jet_rows(stage.module.grid, *arguments)  # (N, S, K + 1, I)
    coefficients = torch.cat([stage.dense[0], stage.dense[1].unsqueeze(-1)], -1)
    products = torch.einsum("nski,oik->sno", phi, coefficients)
    found = evaluate_layer(stage, *arguments)
    parts = [part if part.dim() == 3 else part.unsqueeze(0) for part in found]
    torch.testing.assert_close(torch.cat(parts), products, rtol=1e-12, atol=1e-12)


def test_contract_updates():
    layer, x = KANLinear(3, 5, dtype=torch.float64), points(4)
    before = layer(x)
    added = [update(), update(-2.0)]
    with torch.no_grad():
        for one in added:
            dense = one.dense()
            layer.spline_weight += dense[..., :-1]
            layer.base_weight += dense[..., -1]
    torch.testing.assert_close(before + contract_updates(layer, added, x), layer(x))
    assert contract_updates(layer, [], x) == 0
