# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`train()` of an adapted model, whose base has a `train` of its own."""

from helpers import adapt
from torch import nn

from peft_lotra.kan import KANLinear


class Loop(nn.Sequential):
    """Its `train` is a training loop, as pykan's was in 2024."""

    def train(self, data, steps=3):
        raise AssertionError("nobody asked for it")


class Frozen(nn.Sequential):
    """Stays in evaluation mode, but for its last module."""

    def train(self, mode=True):
        super().train(False)
        self[-1].train(mode)
        return self


def modes(part: nn.Module, mode: bool) -> list[bool]:
    model = adapt(nn.Sequential(KANLinear(3, 4), part)).train(mode)
    return [module.training for module in model.modules() if isinstance(module, nn.Dropout)]


def test_a_train_that_is_a_loop_is_not_called():
    for mode in (True, False):
        assert modes(Loop(nn.Dropout(), Loop(nn.Dropout())), mode) == [mode, mode]


def test_a_train_that_decides_itself_is_called():
    assert modes(Frozen(nn.Dropout(), nn.Dropout()), True) == [False, True]
