# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import assert_same, nested, network, points
from torch import Tensor, nn

from peft_lotra.derivatives import stages as chain
from peft_lotra.derivatives.stages import register_stages, register_wrapper, stages_of
from peft_lotra.kan import KAN, KANLinear, SlimKAN, jet


def test_the_stages_of_a_network():
    model = network(3, 7, 2, norm="layer")
    first, norm, last = stages_of(nn.Sequential(model))
    assert (first.module, norm.module, last.module) == tuple(model.layers)
    assert not norm.is_kan and norm.in_features == 7 and norm.dense is None
    assert first.is_kan and first.in_features == 3 and first.shape == (7, 3, 9)
    assert first.dense == (model.layers[0].spline_weight, model.layers[0].base_weight)
    assert torch.equal(torch.stack([first.grid.low, first.grid.high], -1), model.layers[0].grid_bounds)
    assert first.grid[2:] == (5, 3)


def test_slim_layers_are_an_update_of_nothing():
    model = SlimKAN([3, 7, 2], ranks=(2, 2, 2))
    for stage, layer in zip(stages_of(model), model.layers, strict=True):
        assert stage.dense is None and len(stage.updates) == 1
        dense = torch.cat([layer.spline_weight, layer.base_weight.unsqueeze(-1)], -1)
        torch.testing.assert_close(stage.updates[0].dense(), dense)


class Doubled(KAN):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledLayer(KANLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledSequence(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    model = network()
    model.layers[1].register_forward_pre_hook(lambda module, args: None)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled([3, 2]),
        lambda: DoubledLayer(3, 2),
        lambda: DoubledSequence(network()),
        lambda: nn.Sequential(network(), nn.Softmax(-1)),
        lambda: nn.Sequential(),
        lambda: nn.Bilinear(3, 3, 2),
        hooked,
        lambda: network(norm="batch").train(),
    ],
)
def test_what_is_no_chain(make):
    assert stages_of(make()) is None


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_of_torch(wrap):
    model = network()
    assert [stage.module for stage in stages_of(wrap(model))] == list(model.layers)


def test_other_modules_are_taught(monkeypatch):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(1 * x)

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KANLinear(2, 1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / 2

    monkeypatch.setattr(chain, "_finders", dict(chain._finders))
    assert stages_of(Wrapper()) is None
    register_wrapper(Wrapper, lambda wrapper: wrapper.inside)

    def halved(module):
        (stage,) = stages_of(module.layer)
        return [stage._replace(dense=tuple(part / 2 for part in stage.dense))]

    register_stages(Halved, halved)
    model, x = nn.Sequential(Wrapper(), Halved()), points(80)
    assert len(stages_of(model)) == 4
    assert_same(jet(model, x), nested(model, x))


def test_a_linear_layer_whose_weight_is_taken_out():
    layer = nn.Linear(3, 2)
    assert stages_of(layer) is not None
    del layer.weight
    layer.weight = None
    assert stages_of(layer) is None
