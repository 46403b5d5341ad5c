# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of single layers, which for many points are one operation with a backward pass of its own."""

from __future__ import annotations

import pytest
import torch
from jet_helpers import assert_same, network, points
from torch import Tensor

from peft_lotra.derivatives import bases
from peft_lotra.derivatives.layers import evaluate_layer, jet_rows
from peft_lotra.derivatives.stages import stages_of
from peft_lotra.kan import KAN, KANLinear, jet
from peft_lotra.tucker import Tucker, Update


def same_gradients(found, expected) -> None:
    for a, e in zip(found, expected, strict=True):
        assert (a - e).abs().max() <= 1e-9 * e.abs().max()


@pytest.mark.parametrize("grid_size", [3, 20])
def test_blocks_give_what_one_block_gives(monkeypatch, grid_size):
    """Functions that are kept for the backward pass, and those that are evaluated again."""
    model, x = network(3, 7, 4, 2, grid_size=grid_size), points(700).requires_grad_()

    def results() -> list[Tensor]:
        parts = jet(model, x, torch.ones(2, 3, dtype=torch.float64).tril(), collapse=True)
        return [*parts, *torch.autograd.grad(sum(part.square().sum() for part in parts), [x, *model.parameters()])]

    found = results()
    monkeypatch.setattr(bases, "JET_BLOCK", 0)
    same_gradients(found, results())


def test_far_from_the_grid():
    layer = KANLinear(2, 1, dtype=torch.float64)
    x = torch.tensor([[1e30, -1e30], [float("inf"), 0.3], [float("nan"), 0.1]], dtype=torch.float64).repeat(40, 1)
    parts = [part.reshape(-1, 120)[:, :3] for part in jet(layer, x)]
    assert all(part[:, 0].isfinite().all() for part in parts)
    assert parts[0][:, 2].isnan().all()


def test_autograd_frees_all_that_is_kept():
    """A loss that is kept after its backward pass, as in a list of losses, keeps its graph, but no tensors in it."""
    u, _, second = jet(KAN([2, 8, 1]), torch.rand(200, 2), collapse=True)
    nodes, found = [(u + second).sum().grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        found.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name, value in getattr(node, "__dict__", {}).items():
            parts = value if isinstance(value, tuple | list) else [value]
            assert not any(isinstance(part, Tensor) for part in parts), (type(node).__name__, name)
    assert any("LayerJet" in type(node).__name__ for node in found)


def test_a_grid_that_changes_before_the_backward_pass():
    """As in the layer's own forward pass, an error, and no gradient of another grid."""
    model, x = network(2, 4, 1), points(100, 2).requires_grad_()
    loss = sum(part.square().mean() for part in jet(model, x))
    model.update_grid(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_several_losses_at_once_and_results_that_are_changed_in_place():
    model, x = network(2, 4, 1), points(100, 2).requires_grad_()

    def total(x: Tensor, factor: float = 1.0) -> Tensor:
        return torch.stack([part.mul_(factor).square().sum() for part in jet(model, x)])

    expected = torch.autograd.functional.jacobian(total, x)
    found = torch.autograd.functional.jacobian(total, x, vectorize=True)
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda x: total(x, 2.0), x), 4 * expected)


WEIGHTS = [None, torch.tensor([1.0, -2.0], dtype=torch.float64)]


def update(scale: float = 0.7) -> Update:
    shapes = ((2, 3, 4), (5, 2), (3, 3), (9, 4))
    return Update(scale, Tucker(*(torch.randn(shape, dtype=torch.float64) for shape in shapes)))


def inputs(rows: int, weights: Tensor | None) -> tuple:
    second = torch.randn(2 if weights is None else 1, rows, 3, dtype=torch.float64)
    return [points(rows), torch.randn(2, rows, 3, dtype=torch.float64), second], 2, weights


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("rows", [5, 300])
def test_jet_rows_times_the_coefficients_are_the_jet(rows, degree, weights):
    (stage,) = stages_of(KANLinear(3, 4, spline_order=degree, dtype=torch.float64))
    arguments = inputs(rows, weights)
    phi = jet_rows(stage.formula, *arguments)  # (N, S, K + 1, I)
    found = evaluate_layer(stage.formula, *arguments)
    parts = [part if part.dim() == 3 else part.unsqueeze(0) for part in found]
    products = torch.einsum("nski,oki->sno", phi, stage.formula.joined())
    torch.testing.assert_close(torch.cat(parts), products, rtol=1e-12, atol=1e-12)


def test_updates_are_added_to_the_coefficients():
    layer = KANLinear(3, 5, dtype=torch.float64)
    (stage,), added = stages_of(layer), [update(), update(-2.0)]
    arguments = inputs(40, WEIGHTS[1])
    with torch.no_grad():
        parts = evaluate_layer(stage.formula._replace(updates=tuple(added)), *arguments)
        for one in added:
            dense = one.dense()
            layer.spline_weight += dense[..., :-1]
            layer.base_weight += dense[..., -1]
    assert_same(parts, evaluate_layer(stage.formula, *arguments))
