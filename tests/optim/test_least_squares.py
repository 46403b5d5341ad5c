# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc
import threading

import pytest
import torch
from helpers import adapt
from residuals import equation, fit, problem, terms
from residuals import network as deep_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lotra.kan import KAN, jet, memory
from peft_lotra.optim import LevenbergMarquardt


def points(rows: int = 70) -> Tensor:
    return torch.rand(rows, 2, dtype=torch.float64) * 2.4 - 1.2  # some outside of the grids


def network() -> KAN:
    return KAN([2, 5, 4, 2], dtype=torch.float64)


def laplacian_and_value(model: nn.Module, x: Tensor) -> Tensor:
    u, du, second = jet(model, x, collapse=True)
    return torch.cat([second - u**3, du[0] * model(x)], dim=-1)


# Terms


@pytest.mark.parametrize(
    "term, message",
    [
        (fit, "Residual term 0 is function"),
        ((fit, []), r"The rows of residual term 0 \(fit\) must be tensors"),
        ((fit, (torch.zeros(2, 2), torch.zeros(3, 1))), r"have lengths \[2, 3\]"),
        ((fit, (torch.zeros(0, 2),)), r"have lengths \[0\]"),
        ((fit, (torch.zeros(2, 2),), -1.0), "weight of residual term 0 .fit. is -1.0"),
    ],
)
def test_malformed_terms(term, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(deep_network()).step([term])
    with pytest.raises(ValueError, match="no residual terms"):
        LevenbergMarquardt(deep_network()).step([])


# The Jacobian, chunk by chunk


class Largest(TorchDispatchMode):
    """The most numbers that a tensor held, of all that were made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("residual", [equation, fit])
@pytest.mark.parametrize("by_layers", [True, False])
def test_no_dense_gradient_for_an_adapter(monkeypatch, residual, by_layers):
    monkeypatch.setattr(memory, "_kept", threading.local())  # that of an earlier test may be larger
    rows, width = 40, 120
    model = adapt(deep_network(width), r=(3, 3, 3))
    least_squares = problem(model, [term for term in terms(points=rows) if term[0] is residual])
    ((term, part),) = least_squares.chunks()
    term.by_layers &= by_layers
    with Largest() as largest:
        least_squares.jacobian(term, part)
    # some tensors of features together, and the coefficients themselves; a dense gradient has rows * width**2 * 9
    assert largest.numel <= 9 * rows * width * 9


def test_chunks_and_a_place_for_the_result():
    model, x = adapt(network()), points()
    large, small = (problem(model, [(laplacian_and_value, x)], size) for size in (2**30, 2**18))
    expected = large.jacobian(*next(large.chunks()))
    assert len(list(small.chunks())) > 1
    place = torch.full((len(expected) + 6, expected.shape[1]), torch.nan, dtype=torch.float64)
    first = 0
    for term, rows in small.chunks():
        found = small.jacobian(term, rows, out=place[first:])
        assert found.data_ptr() == place[first:].data_ptr()
        first += len(found)
    torch.testing.assert_close(place[:first], expected)
    assert place[first:].isnan().all() and len(place[first:]) == 6


class Equation:
    """A function, and a bound method, which is a new object at each access."""

    def __init__(self) -> None:
        self.calls = []

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return model(x)

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.residual(model, x)


@pytest.mark.parametrize("method", [False, True])
def test_a_term_is_tried_once(method):
    equation = Equation()
    optimizer, counts = LevenbergMarquardt(network()), []
    for _ in range(3):
        equation.calls.clear()
        term = (equation.residual if method else equation), points()
        assert optimizer.step([term, (laplacian_and_value, points())]).accepted
        counts.append(len(equation.calls))
    assert set(equation.calls) == {70} and max(counts[1:]) < counts[0]


@pytest.mark.parametrize("kind", ["adapter", "other network"])
def test_no_tensor_of_a_term_that_is_gone_stays(kind):
    model = adapt(network(), r=2) if kind == "adapter" else nn.Sequential(nn.Linear(2, 4), nn.Tanh()).double()
    optimizer, residual = LevenbergMarquardt(model), laplacian_and_value if kind == "adapter" else nn.Module.__call__

    def tensors_after_step() -> int:
        optimizer.step([(lambda model, x: residual(model, x), points(20))])
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    before = [tensors_after_step() for _ in range(3)][-1]
    assert [tensors_after_step() for _ in range(3)][-1] < before + 5
