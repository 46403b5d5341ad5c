# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of single layers. For many points, a jet is one operation with its own backward pass."""

import pytest
import torch
from jet_helpers import assert_same, network, points
from torch import Tensor

from peft_lotra.derivatives import bases
from peft_lotra.kan import KAN, KANLinear, jet


@pytest.mark.parametrize("grid_size", [3, 20])
def test_blocks_give_what_one_block_gives(monkeypatch, grid_size):
    """The small basis is kept for the backward pass, and the large one is evaluated again."""
    model, x = network(3, 7, 4, 2, grid_size=grid_size), points(700).requires_grad_()
    directions = torch.ones(2, 3, dtype=torch.float64).tril()

    def results():
        derivatives = jet(model, x, directions, collapse=True)
        total = sum(derivative.square().sum() for derivative in derivatives)
        return [*derivatives, *torch.autograd.grad(total, [x, *model.parameters()])]

    expected = results()
    monkeypatch.setattr(bases, "JET_BLOCK", 0)

    assert_same(results(), expected, 1e-9)


def test_derivatives_far_from_the_grid_are_finite_and_nan_stays():
    layer = KANLinear(2, 1, dtype=torch.float64)
    x = torch.tensor([[1e30, -1e30], [float("inf"), 0.3], [float("nan"), 0.1]], dtype=torch.float64)

    derivatives = [derivative.reshape(-1, 120)[:, :3] for derivative in jet(layer, x.repeat(40, 1))]

    assert all(derivative[:, 0].isfinite().all() for derivative in derivatives)
    assert derivatives[0][:, 2].isnan().all()


def graph_nodes(loss):
    """Return all nodes of the graph of a loss."""
    nodes, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return nodes


def test_autograd_frees_all_tensors_of_a_loss_that_is_kept():
    """A loss that stays in a list keeps its graph, but no tensors in it."""
    u, _, second = jet(KAN([2, 8, 1]), torch.rand(200, 2), collapse=True)

    nodes = graph_nodes((u + second).sum())

    assert any("LayerJet" in type(node).__name__ for node in nodes)
    for node in nodes:
        for name, value in getattr(node, "__dict__", {}).items():
            values = value if isinstance(value, tuple | list) else [value]
            assert not any(isinstance(value, Tensor) for value in values), (type(node).__name__, name)


def test_a_grid_that_changes_before_the_backward_pass_is_an_error():
    """The forward pass of a layer raises the same error, instead of a gradient on another grid."""
    model, x = network(2, 4, 1), points(100, 2).requires_grad_()
    loss = sum(derivative.square().mean() for derivative in jet(model, x))

    model.update_grid(x.detach())

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_several_losses_at_once_and_results_that_are_changed_in_place():
    model, x = network(2, 4, 1), points(100, 2).requires_grad_()

    def losses(x, factor=1.0):
        return torch.stack([derivative.mul_(factor).square().sum() for derivative in jet(model, x)])

    expected = torch.autograd.functional.jacobian(losses, x)
    at_once = torch.autograd.functional.jacobian(losses, x, vectorize=True)
    doubled = torch.autograd.functional.jacobian(lambda x: losses(x, 2.0), x)

    assert_same([at_once], [expected], 1e-11)
    torch.testing.assert_close(doubled, 4 * expected)
