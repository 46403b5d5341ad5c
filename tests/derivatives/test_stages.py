# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import assert_same, nested, network, points
from torch import Tensor, nn

from peft_lotra.derivatives import stages
from peft_lotra.derivatives.stages import register, stages_of
from peft_lotra.kan import KAN, KANLinear, SlimKAN, jet


def test_the_stages_of_a_network():
    model = network(3, 7, 2, norm="layer")
    first, norm, last = stages_of(nn.Sequential(model))
    assert (first.module, norm.module, last.module) == tuple(model.layers)
    assert not norm.is_kan and norm.in_features == 7 and norm.dense is None
    assert first.is_kan and first.in_features == 3 and first.shape == (7, 3, 9)
    assert first.dense == (model.layers[0].spline_weight, model.layers[0].base_weight)


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


def without_weight() -> nn.Module:
    layer = nn.Linear(3, 2)
    del layer.weight
    layer.weight = None
    return layer


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
        without_weight,
        lambda: network(norm="batch").train(),
    ],
)
def test_modules_that_are_no_chain(make):
    assert stages_of(make()) is None


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_of_torch(wrap):
    model = network()
    assert [stage.module for stage in stages_of(wrap(model))] == list(model.layers)


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


def test_registered_modules(monkeypatch):
    monkeypatch.setattr(stages, "_entries", dict(stages._entries))
    assert stages_of(Wrapper()) is None
    register(Wrapper, inner=lambda wrapper: wrapper.inside)

    def halved(module):
        (stage,) = stages_of(module.layer)
        return [stage._replace(dense=tuple(part / 2 for part in stage.dense))]

    register(Halved, halved)
    model, x = nn.Sequential(Wrapper(), Halved()), points(80)
    assert len(stages_of(model)) == 4
    assert_same(jet(model, x), nested(model, x))
