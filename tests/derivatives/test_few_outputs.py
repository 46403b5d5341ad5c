# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import network, points
from stand_ins import FAMILIES
from torch import Tensor

from peft_lotra.derivatives import few_outputs
from peft_lotra.kan import KAN, KANLinear, jet


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
@pytest.mark.parametrize("weights", [None, [1.0, -2.0]])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("order", [3, 4, 5])
def test_few_outputs(monkeypatch, order, outputs, weights, wanted):
    """Piecewise polynomials give what the basis gives, on grids of their own, inside and outside."""
    model, x = network(3, 7, outputs, spline_order=order), points(100).requires_grad_()
    model.layers[1].grid_bounds.copy_(torch.tensor([-0.7, 0.9]).expand(7, 2))
    directions = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, directions, *model.parameters()]

    def results() -> list[Tensor]:
        parts = jet(model, x, directions, collapse=weights or False)
        loss = sum(parts[index].square().sum() for index in wanted)
        return [*parts, *torch.autograd.grad(loss, inputs)]

    found = results()
    monkeypatch.setattr(few_outputs, "MOST_OUTPUTS", 0)
    for a, e in zip(found, results(), strict=True):
        assert (a - e).abs().max() <= 1e-10 * e.abs().max()


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("name", ["fast-kan", "cheby-kan", "efficient-kan-old"])
def test_functions_of_other_libraries(monkeypatch, name, outputs):
    """Those whose basis is no grid, and the same where they would need more memory."""
    hidden, last = FAMILIES[name](3, 7), FAMILIES[name](7, outputs)
    model, x = torch.nn.Sequential(hidden, last).double(), points(100).requires_grad_()
    inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def results() -> list[Tensor]:
        parts = jet(model, x, collapse=True)
        return [*parts, *torch.autograd.grad(sum(part.square().sum() for part in parts), inputs, allow_unused=True)]

    found = results()
    monkeypatch.setattr(few_outputs, "JET_BLOCK", 0)
    for a, e in zip(found, results(), strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a - e).abs().max() <= 1e-10 * e.abs().max()


def test_few_outputs_far_from_the_grid():
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
            assert not any(isinstance(part, torch.Tensor) for part in parts), (type(node).__name__, name)
    assert any("FewOutputs" in type(node).__name__ for node in found)
