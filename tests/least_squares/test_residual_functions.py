# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Residual functions of any network, and those that differentiate by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import FOREIGN, Loop, make_foreign
from helpers import adapt
from stand_ins import FastKANLayer
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:std", "ignore:Adapters have more")


def by_jet(model: nn.Module, x: Tensor) -> Tensor:
    u, _, laplacian = jet(model, x, collapse=True)
    return u**3 - laplacian - 1


def by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """As PINNs are written."""
    x.requires_grad_(True)
    u = model(x)
    du = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
    u_xx, u_yy = (torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i : i + 1] for i in (0, 1))
    return u**3 - u_xx - u_yy - 1


def by_columns(model: nn.Module, x: Tensor) -> Tensor:
    """Without `create_graph` where a function is differentiated for the last time."""
    columns = [column.clone().requires_grad_() for column in x.split(1, dim=1)]
    u = model(torch.cat(columns, 1))
    first = torch.autograd.grad(u.sum(), columns, create_graph=True)
    second = [torch.autograd.grad(du.sum(), c, retain_graph=True)[0] for du, c in zip(first, columns, strict=True)]
    return u**3 - second[0] - second[1] - 1


def steps(model: nn.Module, function, rows: Tensor, count: int = 2) -> list[float]:
    records = LevenbergMarquardt(model).fit([(function, rows)], steps=count, progress=False)
    return [record.loss for record in records]


def rows(count: int = 60) -> Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9 + 0.05


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_the_loss_falls_on_any_network(name, adapted):
    models = [adapt(make_foreign(name)) if adapted and name != "mlp" else make_foreign(name) for _ in range(3)]
    start = by_jet(models[0], rows()).square().mean().item()
    losses = steps(models[0], by_jet, rows())
    assert losses[1] < losses[0] < start
    for model, function in zip(models[1:], (by_autograd, by_columns), strict=True):
        assert steps(model, function, rows(), 1) == pytest.approx(losses[:1], 1e-4)


def test_rows_that_require_a_gradient():
    def function(model: nn.Module, x: Tensor) -> Tensor:
        u = model(x)
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0] - u

    x = rows().requires_grad_()
    assert steps(make_foreign("hard"), function, x, 1)[0] < 1
    assert x.is_leaf and x.grad is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        steps(make_foreign("hard"), function, rows())


def test_functions_may_write_into_their_rows():
    def function(model: nn.Module, x: Tensor) -> Tensor:
        x *= 0.5
        return by_jet(model, x)

    x = rows()
    before = x.clone()
    model = KAN([2, 4, 1], dtype=torch.float64)
    expected = steps(copy.deepcopy(model), by_jet, x / 2)
    assert steps(model, function, x) == pytest.approx(expected)
    assert torch.equal(x, before)


def test_gradients_through_normalizations_are_right():
    """Those of third order by torch alone are not."""
    losses = []
    for function in (by_jet, by_autograd):
        torch.manual_seed(0)
        model = Loop(FastKANLayer(2, 4, use_layernorm=False), FastKANLayer(4, 4), FastKANLayer(4, 1)).double()
        losses.append(steps(model, function, rows(), 3))
    assert losses[0] == pytest.approx(losses[1], 1e-3) and losses[0][-1] < 0.5 * losses[0][0]


def with_backward(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    model(x).sum().backward()
    return x.grad


def with_a_branch(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) * (2 if (x > 0.5).any() else 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [(with_backward, "called inside a functorch transform"), (with_a_branch, "data-dependent control flow")],
)
def test_what_cannot_run_is_refused_by_torch(function, message):
    model = make_foreign("hard-efficient-kan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        steps(model, function, torch.zeros(6, 2, dtype=torch.float64) + 0.2)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
