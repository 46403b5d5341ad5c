# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`fit_path`: the path that it finds, its loss of rows left out, and the rows and losses that it refuses."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lotra import LinearPath, LoTRAConfig, fit_path
from peft_lotra.kan import KAN


def make_rows(count: int = 60) -> Tensor:
    return torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def base(width: int = 2) -> LinearPath:
    torch.manual_seed(0)
    return LinearPath(KAN([3, 6, width], dtype=torch.float64))


X = make_rows()
NOISE = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
SLOPES = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]], dtype=torch.float64)
LINEAR = X @ SLOPES.T + torch.tensor([0.5, -0.5], dtype=torch.float64)
CLASSES = (LINEAR + NOISE).argmax(1)
TARGETS = {
    "squares": (F.mse_loss, LINEAR + 0.3 * NOISE),
    "classes": (nn.CrossEntropyLoss(label_smoothing=0.05), CLASSES),
    "counts": (nn.PoissonNLLLoss(), LINEAR.exp().round()),
    "labels": (F.binary_cross_entropy_with_logits, (LINEAR + NOISE > 0).double()),
    "huber": (nn.HuberLoss(reduction="sum"), LINEAR + 0.3 * NOISE),
}


@pytest.mark.parametrize("inputs", [1.0, 1e-3, 1e3])
def test_a_linear_change_of_the_task_is_found_in_any_units(inputs):
    model = base()
    scaled = X * inputs + 2 * inputs
    y = 0.5 * model.network(scaled).detach() + LINEAR + 100

    fit = fit_path(model, scaled, y, F.mse_loss)

    assert fit.scale == 0.5 or inputs != 1  # the network is linear at small and large inputs
    assert_close(model.path.weight * inputs, SLOPES, rtol=0.01, atol=0.01)
    assert_close(model(scaled), y, rtol=0, atol=0.01)
    assert not model.path.weight.requires_grad


@pytest.mark.parametrize("kind", TARGETS)
def test_losses_of_rows_left_out_are_those_of_fits_without_the_row(kind):
    loss, y = TARGETS[kind]
    fit = fit_path(base(), X, y, loss)

    losses = []
    for row in range(8):
        model = base()
        weights = torch.ones(60, dtype=torch.float64)
        weights[row] = 0
        fit_path(model, X, y, loss, weights=weights)
        losses.append(loss(model(X[row : row + 1]), y[row : row + 1]).detach())

    assert_close(fit.losses[:8].mean(), torch.stack(losses).mean(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("kind", TARGETS)
def test_no_constant_added_to_the_outputs_has_less_loss(kind):
    loss, y = TARGETS[kind]
    model = base()

    fit_path(model, X, y, loss)

    shifts = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(model(X) + shifts, y), shifts)
    assert gradient.abs().max() < 0.05 * (60 if kind == "huber" else 1)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_row_of_weight_zero_does_not_count(kind):
    loss, y = TARGETS[kind]
    weights = (torch.arange(60) < 50).double()

    weighted = fit_path(base(), X, y, loss, weights=7 * weights)
    fewer = fit_path(base(), X[:50], y[:50], loss)

    assert weighted.scale == fewer.scale
    assert_close(weighted.weight, fewer.weight, rtol=1e-2, atol=1e-2)
    assert_close(weighted.losses[:50], fewer.losses, rtol=1e-2, atol=1e-2)


def test_weights_of_classes_are_those_of_their_rows():
    by_class = fit_path(base(), X, CLASSES, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])))
    by_row = fit_path(base(), X, CLASSES, F.cross_entropy, weights=1.0 + CLASSES)

    assert_close(by_class.weight, by_row.weight, rtol=1e-3, atol=1e-3)


def test_the_path_of_the_active_adapter_is_fitted_and_the_base_stays():
    model = get_peft_model(base(), LoTRAConfig())
    model.add_adapter("other", LoTRAConfig())
    model.set_adapter("other")
    network = model.get_base_model()
    before = copy.deepcopy(network.path_of("default").state_dict())

    fit = fit_path(model, X.view(20, 3, 3), LINEAR.view(20, 3, 2), F.mse_loss)

    assert_close(network.path_of("other").weight.detach(), fit.weight)
    for name in ("default", "__base__"):
        assert_close(dict(network.path_of(name).state_dict()), dict(before))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


SATURATED = lambda f, y: ((f - y).square() / (1 + (f - y).square())).mean()  # noqa: E731
MSE = {"y": LINEAR, "loss": F.mse_loss}
REFUSED = {
    "no path": ({**MSE, "model": KAN([3, 2])}, "without a path"),
    "two rows": ({"x": X[:2], "y": LINEAR[:2], "loss": F.mse_loss}, "at least 3"),
    "two weights": ({**MSE, "weights": (torch.arange(60) < 2).double()}, "2 rows"),
    "constant": ({**MSE, "x": torch.ones_like(X)}, "constant inputs"),
    "NaN": ({**MSE, "x": X / 0}, "finite"),
    "shape": ({"y": LINEAR[:, :1], "loss": F.mse_loss}, "shape of the outputs"),
    "rows": ({"y": LINEAR[:9], "loss": F.mse_loss}, "begin alike"),
    "mixes rows": ({**MSE, "model": LinearPath(nn.Sequential(nn.Linear(3, 2), Mixing()).double())}, "mixes rows"),
    "batch norm": ({**MSE, "model": LinearPath(KAN([3, 2, 2], norm="batch", dtype=torch.float64))}, "eval"),
    "no tensor": ({**MSE, "model": LinearPath(nn.LSTM(3, 2).double(), 3, 2)}, "tuple"),
    "not convex": ({"y": LINEAR, "loss": SATURATED}, "not convex"),
    "no curvature": ({"y": LINEAR, "loss": F.l1_loss}, "second derivatives"),
    "probabilities": ({"y": LINEAR.sigmoid(), "loss": F.binary_cross_entropy}, "logits"),
    "no mean": ({"y": LINEAR, "loss": lambda f, y: (f - y).norm()}, "mean or the sum"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_changes(case):
    changes, match = REFUSED[case]
    arguments = {"model": base(), "x": X, **changes}
    before = copy.deepcopy(arguments["model"].state_dict())

    with pytest.raises(ValueError, match=match):
        fit_path(**arguments)

    after = arguments["model"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_class_without_a_row_is_named():
    with pytest.warns(UserWarning, match=r"\[1\] have no row"):
        fit_path(base(), X, CLASSES * 0, F.cross_entropy)
