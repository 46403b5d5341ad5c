# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


from __future__ import annotations

import copy
import platform
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import adapt, base, inputs
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra.derivatives import splines
from peft_lotra.kan import KAN, SlimKAN, basis, jet, laplacian
from peft_lotra.kan.memory import _kept
from peft_lotra.optim import LevenbergMarquardt


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Each test starts as a new thread does: what is kept is what the test evaluates first."""
    for name in list(vars(_kept)):
        delattr(_kept, name)
    basis._power_constants.cache_clear()
    splines.spline_pieces.cache_clear()


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a training step."""
    loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: KAN([3, 8, 4]),
    "wide": lambda: KAN([20, 8, 4]),
    "sparse": lambda: KAN([3, 8, 4], grid_size=64),
    "slim": lambda: SlimKAN([3, 8, 4], ranks=(2, 2, 2)),
    "normalized": lambda: KAN([3, 8, 4], norm="batch").eval(),
    "float64": lambda: KAN([3, 8, 4]).double(),
    **{f"adapted {name}": lambda name=name: adapt(base(name)) for name in FAMILIES},
    "adapted, sparse": lambda: adapt(KAN([3, 8, 4], grid_size=64)),
    "adapted, slim": lambda: adapt(SlimKAN([3, 8, 4], ranks=(2, 2, 2)), r=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [6, 200])
def test_training_and_evaluation_under_inference_mode_in_any_order(name: str, rows: int) -> None:
    model = MODELS[name]()
    width = 20 if name == "wide" else 3
    x = inputs(rows, next(model.parameters()).dtype, width)
    first = evaluate(model, x)  # the memory is allocated here
    gradients = train(model, x)
    again = evaluate(model, x)
    assert torch.equal(first, again)
    for before, after in zip(gradients, train(model, x), strict=True):
        assert torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(model(x), first)
    twin = copy.deepcopy(model)
    assert torch.equal(evaluate(twin, x), first)
    for before, after in zip(gradients, train(twin, x), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("function", [lambda m, x: jet(m, x)[2], laplacian])
def test_jets_under_inference_mode_then_trained(function: Callable, outputs: int) -> None:
    model, x = KAN([3, 8, outputs]).double(), inputs(200, torch.float64)
    first = evaluate(lambda x: function(model, x), x)
    second = function(model, x)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    second.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(evaluate(lambda x: function(model, x), x), first)


@pytest.mark.parametrize("grid_size", [5, 64])
def test_levenberg_marquardt_between_evaluations(grid_size: int) -> None:
    model, x = adapt(KAN([3, 6, 1], grid_size=grid_size)), inputs(100)
    optimizer = LevenbergMarquardt(model)

    def residual(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) + 0.1 * laplacian(model, x)).squeeze(-1) - x.sum(-1)

    evaluate(model, x)
    first = optimizer.step([(residual, x)])
    evaluate(lambda x: laplacian(model, x), x)
    second = optimizer.step([(residual, x)])
    assert first.accepted and second.accepted
    assert second.loss < first.loss


@pytest.mark.parametrize("grid_size", [5, 64])
def test_memory_of_another_dtype_or_size_is_replaced(grid_size: int) -> None:
    model, double = KAN([3, 8, 4], grid_size=grid_size), KAN([3, 8, 4], grid_size=grid_size).double()
    for rows in (200, 70, 1000):
        for network in (model, double, model):
            x = inputs(rows, next(network.parameters()).dtype)
            expected = torch.cat([network(part) for part in x.split(97)])
            torch.testing.assert_close(evaluate(network, x), expected)
            train(network, x)


def test_threads_have_memory_of_their_own() -> None:
    model, x = KAN([20, 30, 20]), inputs(2000, in_features=20)
    expected = train(model, x)
    found: list[list[Tensor]] = []

    def work() -> None:
        for _ in range(5):
            evaluate(model, x)
            found.append(train(model, x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for gradients in found:
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other)


FAULTS = """
import resource
import sys
import torch
if len(sys.argv) > 1:
    import peft_lotra.kan
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.zeros(2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
def test_freed_memory_stays_with_the_process():
    def count(*args: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, *args], check=True, capture_output=True).stdout)

    assert count("with the package") < 100 < count()
