# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of many points, whose layers are one operation with a backward pass of its own."""

from __future__ import annotations

import pytest
import torch
from jet_helpers import assert_same, nested, network, points
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra.derivatives import bases
from peft_lotra.kan import KAN, KANLinear, jet


def same_gradients(found, expected) -> None:
    for a, e in zip(found, expected, strict=True):
        assert (a - e).abs().max() <= 1e-9 * e.abs().max()


@pytest.mark.parametrize("weights", [None, [1.0, -2.0]])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("order", range(2, 6))
def test_values_and_gradients(order, outputs, weights):
    """On grids of their own, inside and outside; gradients once and, of order 4 and 5, twice."""
    model, x = network(3, 7, outputs, spline_order=order), points(100)
    model.layers[1].grid_bounds.copy_(torch.tensor([-0.7, 0.9]).expand(7, 2))
    directions, parameters = torch.randn(2, 3, dtype=torch.float64), list(model.parameters())
    u, du, d2u = nested(model, x, directions)
    expected = u, du, d2u if weights is None else d2u[0] - 2 * d2u[1]
    found = jet(model, x, directions, collapse=weights or False)
    assert_same(found, expected)
    gradients = [[], []]
    for parts, into in zip((found, expected), gradients, strict=True):
        for part in parts:
            into += torch.autograd.grad(part.square().sum(), parameters, retain_graph=True, materialize_grads=True)
        if order >= 4:
            total = sum(part.pow(3).sum() for part in parts)
            once = torch.autograd.grad(total, parameters, create_graph=True)
            into += torch.autograd.grad(sum(g.square().sum() for g in once), parameters)
    same_gradients(*gradients)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("name", ["fast-kan", "cheby-kan", "efficient-kan-old"])
def test_functions_of_other_libraries(name, outputs):
    model = nn.Sequential(FAMILIES[name](3, 7), FAMILIES[name](7, outputs)).double()
    x, parameters = points(100), [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for _, _, second in (jet(model, x), nested(model, x)):
        gradients.append(torch.autograd.grad(second.square().sum(), parameters, allow_unused=True))
    for a, e in zip(*gradients, strict=True):
        assert (a is None) == (e is None)
        if e is not None and name != "fast-kan":  # layer normalization: torch has wrong third derivatives
            assert (a - e).abs().max() <= 1e-9 * e.abs().max()


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("grid_size", [3, 20])
def test_blocks_give_what_one_block_gives(monkeypatch, grid_size, outputs):
    """Functions that are kept for the backward pass, and those that are evaluated again."""
    model, x = network(3, 7, 4, outputs, grid_size=grid_size), points(700).requires_grad_()

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


@pytest.mark.parametrize("outputs", [1, 4])
def test_autograd_frees_all_that_is_kept(outputs):
    """A loss that is kept after its backward pass, as in a list of losses, keeps its graph, but no tensors in it."""
    u, _, second = jet(KAN([2, 8, outputs]), torch.rand(200, 2), collapse=True)
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


@pytest.mark.parametrize("outputs", [1, 4])
def test_a_grid_that_changes_before_the_backward_pass(outputs):
    """As in the layer's own forward pass, an error, and no gradient of another grid."""
    model, x = network(2, 4, outputs), points(100, 2).requires_grad_()
    loss = sum(part.square().mean() for part in jet(model, x))
    model.update_grid(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("outputs", [1, 4])
def test_gradients_of_several_losses_at_once(outputs):
    model, x = network(2, 4, outputs), points(100, 2)

    def total(x):
        return torch.stack([part.square().sum() for part in jet(model, x)])

    expected = torch.autograd.functional.jacobian(total, x)
    found = torch.autograd.functional.jacobian(total, x, vectorize=True)
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("part", range(3))
def test_results_can_be_changed_in_place(outputs, part):
    model, x = network(2, 4, outputs), points(100, 2).requires_grad_()
    (expected,) = torch.autograd.grad((2 * jet(model, x)[part]).sum(), x)
    (found,) = torch.autograd.grad(jet(model, x)[part].mul_(2).sum(), x)
    torch.testing.assert_close(found, expected)
