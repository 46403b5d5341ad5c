# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import points
from torch import Tensor

from peft_lotra.derivatives import layers
from peft_lotra.derivatives.layers import Jet, block_size, contract_updates, evaluate_layer, jet_rows
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.kan import KANLinear, SlimKANLinear
from peft_lotra.tucker import Tucker, Update


def update(scale: float = 0.7) -> Update:
    shapes = ((2, 3, 4), (5, 2), (3, 3), (9, 4))
    return Update(scale, Tucker(*(torch.randn(shape, dtype=torch.float64) for shape in shapes)))


def inputs(rows: int, weights: Tensor | None) -> tuple:
    second = torch.randn(2 if weights is None else 1, rows, 3, dtype=torch.float64)
    return points(rows), torch.randn(2, rows, 3, dtype=torch.float64), second, weights, False


WEIGHTS = [None, torch.tensor([1.0, -2.0], dtype=torch.float64)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", [2, 100])  # in factored form, dense
def test_an_update_is_what_it_adds_to_the_coefficients(rows, weights):
    layer, added = KANLinear(3, 5, dtype=torch.float64), update()
    (stage,) = stages_of(layer)
    dense = added.dense()
    summed = stage._replace(dense=(stage.dense[0] + dense[..., :-1], stage.dense[1] + dense[..., -1]))
    arguments = inputs(rows, weights)
    found = evaluate_layer(stage._replace(updates=(added,)), *arguments)
    for a, e in zip(found, evaluate_layer(summed, *arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("only_second", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("rows", [5, 300])
def test_jet_rows_times_the_coefficients_are_the_jet(rows, order, weights, only_second):
    (stage,) = stages_of(KANLinear(3, 4, spline_order=order, dtype=torch.float64))
    z, first, second, weights, _ = inputs(rows, weights)
    found = evaluate_layer(stage, z, first, second, weights, only_second)
    phi = jet_rows(stage.grid, z, first, second, weights, only_second, rows)  # (N, S, K + 1, I)
    coefficients = torch.cat([stage.dense[0], stage.dense[1].unsqueeze(-1)], -1)
    products = torch.einsum("nski,oik->sno", phi, coefficients)
    parts = [part if part.dim() == 3 else part.unsqueeze(0) for part in found.parts]
    torch.testing.assert_close(torch.cat(parts), products, rtol=1e-12, atol=1e-12)
    assert (found.value is None) is only_second or rows > 64  # by hand or by plain operations


def test_contract_updates():
    layer, x = KANLinear(3, 5, dtype=torch.float64), points(4)
    (stage,) = stages_of(layer)
    before = layer(x)
    added = [update(), update(-2.0)]
    with torch.no_grad():
        for one in added:
            dense = one.dense()
            layer.spline_weight += dense[..., :-1]
            layer.base_weight += dense[..., -1]
    torch.testing.assert_close(before + contract_updates(layer, added, x), layer(x))
    assert contract_updates(layer, [], x) == 0


def test_blocks_of_rows_are_for_factored_updates(monkeypatch):
    x = points(5000)
    dense, slim = (stages_of(layer) for layer in (KANLinear(3, 5), SlimKANLinear(3, 2000, 2)))
    assert block_size(x, dense, 2) is None
    monkeypatch.setattr(layers, "PLAIN_JET_BLOCK", 2**16)
    monkeypatch.setattr(layers, "_is_contracted", lambda *args, **kwargs: True)
    assert 128 <= block_size(x, slim, 2) < 5000
    assert block_size(x[:40], slim, 2) is None


def test_map_passes_over_what_is_not_there():
    jet = Jet(None, None, torch.ones(2)).map(lambda part: part + 1)
    assert jet.value is None and jet.first is None and torch.equal(jet.second, torch.full((2,), 2.0))
    assert len(jet.parts) == 1
