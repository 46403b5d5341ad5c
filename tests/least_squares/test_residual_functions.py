# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Residual functions of any network, which may differentiate by `jet` or by autograd."""

import copy

import pytest
import torch
from foreign import FOREIGN, Loop, make_foreign
from helpers import adapt, assert_equal, refused
from stand_ins import FastKANLayer
from torch import nn

from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


pytestmark = pytest.mark.filterwarnings("ignore:`jet` knows no closed form", "ignore:std", "ignore:Adapters have more")


def by_jet(model, x):
    u, _, laplacian = jet(model, x, collapse=True)
    return u**3 - laplacian - 1


def by_autograd(model, x):
    """Differentiate as PINNs do."""
    x.requires_grad_(True)
    u = model(x)
    du = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
    u_xx, u_yy = (torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i : i + 1] for i in (0, 1))
    return u**3 - u_xx - u_yy - 1


def by_columns(model, x):
    """Differentiate without `create_graph` the last time."""
    columns = [column.clone().requires_grad_() for column in x.split(1, dim=1)]
    u = model(torch.cat(columns, 1))
    first = torch.autograd.grad(u.sum(), columns, create_graph=True)
    second = [torch.autograd.grad(du.sum(), c, retain_graph=True)[0] for du, c in zip(first, columns, strict=True)]
    return u**3 - second[0] - second[1] - 1


def steps(model, function, rows, count=2):
    records = LevenbergMarquardt(model).fit([(function, rows)], steps=count, progress=False)
    return [record.loss for record in records]


def rows(count=60):
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9 + 0.05


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_the_loss_falls_on_any_network_by_jet_or_autograd(name, adapted):
    def model():
        network = make_foreign(name)
        return adapt(network) if adapted and name != "mlp" else network

    trained = model()
    start = by_jet(trained, rows()).square().mean().item()

    losses = steps(trained, by_jet, rows())

    assert losses[1] < losses[0] < start
    assert steps(model(), by_autograd, rows(), 1) == pytest.approx(losses[:1], 1e-4)
    assert steps(model(), by_columns, rows(), 1) == pytest.approx(losses[:1], 1e-4)


def slope_minus_value(model, x):
    u = model(x)
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0] - u


def test_rows_that_require_a_gradient_stay_leaves():
    x = rows().requires_grad_()

    assert steps(make_foreign("hard"), slope_minus_value, x, 1)[0] < 1

    assert x.is_leaf
    assert x.grad is None


def test_rows_that_do_not_require_a_gradient_are_not_differentiated():
    with pytest.raises(RuntimeError, match="does not require grad"):
        steps(make_foreign("hard"), slope_minus_value, rows())


def test_functions_may_write_into_their_rows():
    def halving(model, x):
        x *= 0.5
        return by_jet(model, x)

    x = rows()
    model = KAN([2, 4, 1], dtype=torch.float64)
    expected = steps(copy.deepcopy(model), by_jet, x / 2)

    losses = steps(model, halving, x)

    assert losses == pytest.approx(expected)
    assert_equal(x, rows())


class WrittenPolynomials(nn.Module):
    """JacobiKAN's polynomials, which it writes into a tensor one by one."""

    def __init__(self):
        super().__init__()
        self.coefficients = nn.Parameter(torch.randn(1, 2, 3, dtype=torch.float64))

    def forward(self, x):
        functions = torch.ones(*x.shape, 3, dtype=x.dtype)
        functions[..., 1] = x
        functions[..., 2] = 2 * x * functions[..., 1].clone() - 1
        return torch.einsum("bik,oik->bo", functions, self.coefficients)


@pytest.mark.parametrize("function", [by_jet, by_columns])
def test_networks_that_write_into_tensors_are_differentiated_row_by_row(function):
    model = WrittenPolynomials()
    written = copy.deepcopy(model)
    written.forward = lambda x: torch.einsum(
        "bik,oik->bo", torch.stack([torch.ones_like(x), x, 2 * x * x - 1], -1), written.coefficients
    )
    expected = steps(written, function, rows())

    with pytest.warns(RuntimeWarning, match="row by row"):
        losses = steps(model, function, rows())

    assert losses == pytest.approx(expected)


def test_gradients_through_normalizations_are_right():
    """Torch's own derivatives of third order are not."""

    def losses(function):
        torch.manual_seed(0)
        layers = FastKANLayer(2, 4, use_layernorm=False), FastKANLayer(4, 4), FastKANLayer(4, 1)
        return steps(Loop(*layers).double(), function, rows(), 3)

    expected = losses(by_jet)

    assert expected[-1] < 0.5 * expected[0]
    assert losses(by_autograd) == pytest.approx(expected, 1e-3)


def with_backward(model, x):
    x.requires_grad_()
    model(x).sum().backward()
    return x.grad


def with_a_branch(model, x):
    return model(x) * (2 if (x > 0.5).any() else 1)


@pytest.mark.parametrize(
    "function, message",
    [(with_backward, "called inside a functorch transform"), (with_a_branch, "data-dependent control flow")],
)
def test_what_cannot_run_is_refused_by_torch(function, message):
    model = make_foreign("hard-efficient-kan")

    with refused(message, model, error=RuntimeError):
        steps(model, function, torch.zeros(6, 2, dtype=torch.float64) + 0.2)

    assert all(parameter.grad is None for parameter in model.parameters())
