# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks that are evaluated and trained in any order: nothing that is kept between calls changes a result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROUNDING, adapt, base, inputs, relative
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra.kan import KAN, SlimKAN


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a training step."""
    loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def evaluate(model: Callable, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


def in_threads(work: Callable, count: int = 1) -> None:
    """Runs it where nothing is kept yet."""
    with ThreadPoolExecutor(count) as executor:
        for done in [executor.submit(work) for _ in range(count)]:
            done.result()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: KAN([3, 8, 4]),
    "sparse": lambda: KAN([3, 8, 4], grid_size=64),
    "slim": lambda: SlimKAN([3, 8, 4], ranks=(2, 2, 2)),
    "normalized": lambda: KAN([3, 8, 4], norm="batch").eval(),
    **{f"adapted {name}": lambda name=name: adapt(base(name)) for name in FAMILIES},
    "adapted, sparse": lambda: adapt(KAN([3, 8, 4], grid_size=64)),
    "adapted, slim": lambda: adapt(SlimKAN([3, 8, 4], ranks=(2, 2, 2)), r=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [6, 200])
def test_training_and_evaluation_under_inference_mode_in_any_order(name: str, rows: int) -> None:
    model, x = MODELS[name](), inputs(rows)

    def work() -> None:
        first = evaluate(model, x)  # the memory is allocated here
        gradients = train(model, x)
        for same in (model, copy.deepcopy(model)):
            assert torch.equal(evaluate(same, x), first)
            assert all(map(torch.equal, train(same, x), gradients))

    in_threads(work)


@pytest.mark.parametrize("grid_size", [5, 64])
def test_memory_of_another_dtype_or_size_is_replaced(grid_size: int) -> None:
    model, double = KAN([3, 8, 4], grid_size=grid_size), KAN([3, 8, 4], grid_size=grid_size).double()
    for rows in (200, 70, 1000):
        for network in (model, double, model):
            x = inputs(rows, next(network.parameters()).dtype)
            expected = torch.cat([network(part) for part in x.split(97)])
            assert relative(evaluate(network, x), expected) < ROUNDING[x.dtype]
            train(network, x)


def test_threads_have_memory_of_their_own() -> None:
    model, x = KAN([20, 30, 20]), inputs(2000, in_features=20)
    expected = train(model, x)
    in_threads(lambda: [torch.testing.assert_close(train(model, x), expected) for _ in range(5)], count=4)
