# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks are evaluated and trained in any order: memory that is reused between calls changes no result."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROUNDING, adapt, assert_equal, base, inputs, relative
from stand_ins import LAYER_KINDS

from peft_lotra.kan import KAN, SlimKAN


def train(model, x):
    """Return the gradients of a training step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(x).square().sum(), parameters))


def evaluate(model, x):
    with torch.inference_mode():
        return model(x).clone()


def in_threads(work, count=1):
    """Run the work in new threads, which have no memory yet."""
    with ThreadPoolExecutor(count) as executor:
        for future in [executor.submit(work) for _ in range(count)]:
            future.result()


MODELS = {
    "dense": lambda: KAN([3, 8, 4]),
    "slim": lambda: SlimKAN([3, 8, 4], ranks=(2, 2, 2)),
    "normalized": lambda: KAN([3, 8, 4], norm="batch").eval(),
    **{f"adapted {name}": lambda name=name: adapt(base(name)) for name in LAYER_KINDS},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [6, 200])
def test_training_and_evaluation_under_inference_mode_in_any_order(name, rows):
    model, x = MODELS[name](), inputs(rows)

    def work():
        y = evaluate(model, x)  # allocates the memory
        gradients = train(model, x)
        for network in (model, copy.deepcopy(model)):
            assert_equal(evaluate(network, x), y)
            assert_equal(train(network, x), gradients)

    in_threads(work)


@pytest.mark.parametrize("grid_size", [5, 64])
def test_memory_of_another_dtype_or_size_is_replaced(grid_size):
    single = KAN([3, 8, 4], grid_size=grid_size)
    double = KAN([3, 8, 4], grid_size=grid_size).double()

    for rows in (200, 70, 1000):
        for network in (single, double, single):
            x = inputs(rows, next(network.parameters()).dtype)
            expected = torch.cat([network(chunk) for chunk in x.split(97)])
            assert relative(evaluate(network, x), expected) < ROUNDING[x.dtype]
            train(network, x)


def test_threads_have_memory_of_their_own():
    model, x = KAN([20, 30, 20]), inputs(2000, in_features=20)
    expected = train(model, x)

    def work():
        for _ in range(5):
            torch.testing.assert_close(train(model, x), expected)

    in_threads(work, count=4)
