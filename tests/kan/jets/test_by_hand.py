# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import pytest
import torch

from peft_lotra.kan import KANLinear
from peft_lotra.kan.basis import bspline_basis
from peft_lotra.kan.jets.by_hand import JetRows, LayerFeatures


@pytest.mark.parametrize("order", range(1, 6))
def test_features_are_the_derivatives_of_the_basis(order):
    layer = KANLinear(3, 2, spline_order=order, dtype=torch.float64)
    z = torch.rand(3, 50, dtype=torch.float64) * 2.4 - 1.2
    features = LayerFeatures(layer.grid, z)
    found, *_ = features.derivatives(z, range(4))
    for d in range(4):
        scale = features.scales[d] if d else 1
        basis = bspline_basis(z.T, *layer.grid, derivative=d).permute(2, 1, 0)
        torch.testing.assert_close(found[d][:-1] * scale, basis, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0][-1], torch.nn.functional.silu(z))


def test_blocks_hold_all_rows_once():
    features = LayerFeatures(KANLinear(40, 2).grid, torch.rand(40, 10_000))
    blocks = features.blocks(10_000)
    assert len(blocks) > 1 and max(block.stop - block.start for block in blocks) <= features.rows
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(10_000))
    assert features.blocks(0) == []


def test_jet_rows_of_a_weighted_sum():
    layer, z = KANLinear(3, 2, dtype=torch.float64), torch.rand(3, 20, dtype=torch.float64)
    first, second = torch.rand(2, 3, 20, dtype=torch.float64), torch.rand(1, 3, 20, dtype=torch.float64)
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64)
    rows = JetRows(LayerFeatures(layer.grid, z), slice(0, 20), z, first, second, weights, range(3))
    df, d2f = (bspline_basis(z.T, *layer.grid, derivative=d).permute(2, 1, 0) for d in (1, 2))
    expected = d2f * (2 * first[0] ** 2 - first[1] ** 2) + df * second[0]
    torch.testing.assert_close(rows.second(0).view(9, 3, 20)[:-1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows.first(1).view(9, 3, 20)[:-1], df * first[1], rtol=1e-9, atol=1e-9)
