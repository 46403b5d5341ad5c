# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import network, points

from peft_lotra.derivatives import splines
from peft_lotra.derivatives.layer_jet import JetRows, directional
from peft_lotra.derivatives.splines import SplineFeatures
from peft_lotra.kan import KANLinear, jet
from peft_lotra.kan.basis import bspline_basis


def test_jet_rows_of_a_weighted_sum():
    layer, z = KANLinear(3, 2, dtype=torch.float64), torch.rand(3, 20, dtype=torch.float64)
    first, second = torch.rand(2, 3, 20, dtype=torch.float64), torch.rand(1, 3, 20, dtype=torch.float64)
    weights = torch.tensor([2.0, -1.0], dtype=torch.float64)
    features = SplineFeatures(layer.grid, z)
    jet_rows = JetRows(directional(features.scale, first, second, weights), (1, 2, 1))
    ((part, found),) = features.parts(z, jet_rows.orders(False), ())
    rows = [matrix.clone().view(9, 3, 20)[:-1] for _, matrix in jet_rows.matrices(found, part)]
    f, df, d2f = (bspline_basis(z.T, *layer.grid, derivative=d).permute(2, 1, 0) for d in range(3))
    expected = [f, df * first[0], df * first[1], d2f * (2 * first[0] ** 2 - first[1] ** 2) + df * second[0]]
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("collapse", [False, [1.0, -2.0]])
@pytest.mark.parametrize("grid_size", [3, 20])
def test_blocks_give_what_one_block_gives(monkeypatch, grid_size, collapse, wanted):
    """Features that are kept for the backward pass, and those that are evaluated again."""
    model, x = network(3, 7, 4, 5, grid_size=grid_size), points(700).requires_grad_()
    inputs = [x, *model.parameters()]

    def results() -> list[torch.Tensor]:
        parts = jet(model, x, torch.ones(2, 3, dtype=torch.float64).tril(), collapse=collapse)
        loss = sum(parts[index].square().sum() for index in wanted)
        return [*parts, *torch.autograd.grad(loss, inputs)]

    found = results()
    monkeypatch.setattr(splines, "JET_BLOCK", 0)
    monkeypatch.setattr(splines, "JET_PART", 0)
    for a, e in zip(found, results(), strict=True):
        assert (a - e).abs().max() <= 1e-11 * e.abs().max()


@pytest.mark.parametrize("outputs", [1, 3])  # by edges, and by all functions
def test_a_grid_that_changes_before_the_backward_pass(outputs):
    """As in the layer's own forward pass, an error, and no gradient of another grid."""
    model, x = network(2, 4, outputs), points(100, 2).requires_grad_()
    loss = sum(part.square().mean() for part in jet(model, x))
    model.update_grid(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("outputs", [1, 3])
def test_gradients_of_several_losses_at_once(outputs):
    model, x = network(2, 4, outputs), points(100, 2)

    def total(x):
        return torch.stack([part.square().sum() for part in jet(model, x)])

    expected = torch.autograd.functional.jacobian(total, x)
    found = torch.autograd.functional.jacobian(total, x, vectorize=True)
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("part", range(3))
def test_results_can_be_changed_in_place(outputs, part):
    model, x = network(2, 4, outputs), points(100, 2).requires_grad_()
    loss = (2 * jet(model, x)[part]).sum()
    (expected,) = torch.autograd.grad(loss, x)
    (found,) = torch.autograd.grad(jet(model, x)[part].mul_(2).sum(), x)
    torch.testing.assert_close(found, expected)
