# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import nested, network
from torch import Tensor, nn

from peft_lotra.kan import jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.pde import gradient_weights


def test_gradient_weights_against_autograd():
    model, x = network(2, 5, 2), torch.rand(20, 2, dtype=torch.float64)
    slopes = nested(model, x)[1]  # (2, 20, 2)
    expected = 1 / (1 + 0.3 * slopes.square().sum((0, 2)).sqrt())
    found = gradient_weights(model, x, 0.3)
    torch.testing.assert_close(found[:, 0], expected)
    assert not found.requires_grad
    along = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    expected = 1 / (1 + 0.3 * slopes[0].square().sum(1).sqrt())
    torch.testing.assert_close(gradient_weights(model, x, 0.3, along)[:, 0], expected)


def test_weights_are_rows_of_residual_terms():
    torch.manual_seed(1)
    model, x = network(2, 5, 1), torch.rand(80, 2, dtype=torch.float64)

    def equation(model: nn.Module, x: Tensor, w: Tensor | float) -> Tensor:
        u, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
        return w * (u_t - u_xx - u)

    before = equation(model, x, 1.0).square().mean().item()
    for _ in range(2):
        LevenbergMarquardt(model).fit([(equation, (x, gradient_weights(model, x)))], 3, progress=False)
    assert equation(model, x, 1.0).square().mean().item() < before


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`scale` is -1"):
        gradient_weights(network(2, 1), torch.rand(4, 2), -1)
