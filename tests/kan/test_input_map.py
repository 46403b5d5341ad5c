# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import assert_same, nested, network, points
from torch import Tensor, nn

from peft_lotra.derivatives.stages import stages_of
from peft_lotra.kan import jet
from peft_lotra.kan.input_map import InputMap


class Waves(InputMap):
    """sin and cos of the first input, sin of the second."""

    def __init__(self) -> None:
        super().__init__(2, [0, 0, 1])

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phase = torch.tensor([0.0, 1.5, 0.0], dtype=z.dtype)
        return torch.sin(z + phase), torch.cos(z + phase), -torch.sin(z + phase)


@pytest.mark.filterwarnings("error:`jet` knows no closed form")
@pytest.mark.parametrize("shape", [(5, 2), (2, 3, 2), (2,)])
def test_first_in_a_chain_and_between_layers(shape):
    model = nn.Sequential(Waves(), network(3, 4, 2), Waves(), network(3, 4, 1))
    x = points(30, 2)[: torch.Size(shape[:-1]).numel()].reshape(shape)
    u, du, d2u = nested(model, x)
    assert_same(jet(model, x), (u, du, d2u))
    assert_same(jet(model, x, collapse=True), (u, du, d2u.sum(0)))


def test_a_subclass_that_computes_something_else_is_no_stage():
    class Doubled(Waves):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert stages_of(Waves()) and stages_of(Doubled()) is None


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"shape \(4, 3\), but Waves expects a last dimension of 2"):
        Waves()(torch.rand(4, 3))
