# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.derivatives import splines
from peft_lotra.derivatives.splines import SplineFeatures
from peft_lotra.kan import KANLinear
from peft_lotra.kan.basis import bspline_basis, cardinal_spline


def dense(features: SplineFeatures, z: torch.Tensor, orders: list[int]) -> dict[int, torch.Tensor]:
    """All functions at z (I, N) by order, (K + 1, I, N), part by part."""
    parts = [
        torch.stack([matrix.clone() for _, matrix in found.matrices(list(found.functions.values()))])
        for _, found in features.parts(z, orders, ())
    ]
    return dict(zip(orders, torch.cat(parts, -1).view(len(orders), *features.shape, -1), strict=True))


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("order", range(1, 6))
def test_features_are_the_derivatives_of_the_basis(monkeypatch, order, size):
    """At points inside and outside of the grid, in parts of blocks."""
    layer = KANLinear(3, 2, size, spline_order=order, dtype=torch.float64)
    layer.grid_bounds[1] = torch.tensor([-0.5, 0.7])
    z = (torch.rand(3, 1000, dtype=torch.float64) * 2 - 1) * (1.5 + 2 * order / size)
    features = SplineFeatures(layer.grid, z)
    features.rows, features.rows_of_part = 400, 150
    found = dense(features, z, [0, 1, 2, 3])
    for d in range(4):
        scale = features.scale**d
        basis = bspline_basis(z.T, *layer.grid, derivative=d).permute(2, 1, 0)
        torch.testing.assert_close(found[d][:-1] * scale, basis, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0][-1], torch.nn.functional.silu(z))


@pytest.mark.parametrize("order", range(1, 6))
def test_pieces_are_the_cardinal_spline(order):
    pieces = splines.spline_pieces(order, torch.float64, torch.device("cpu"))
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    for d, of_derivative in enumerate(pieces):
        for row, piece in enumerate(of_derivative):
            value = sum(coefficient * t**power for power, coefficient in enumerate(piece))
            torch.testing.assert_close(value, cardinal_spline(t + (order - 1) / 2 - row, order, d))


def test_blocks_hold_all_rows_once():
    features = SplineFeatures(KANLinear(40, 2).grid, torch.rand(40, 10_000))
    parts = [part for part, _ in features.parts(torch.rand(40, 10_000), [0], ())]
    assert len(parts) > 1 and max(part.stop - part.start for part in parts) <= features.rows
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(10_000))
    assert list(features.parts(torch.rand(40, 0), [0], ())) == []
