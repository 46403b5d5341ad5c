# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows of adapters in models that call, and feed, their layers in ways of their own."""

import pytest
import torch
from behaving import adapted, add, apart
from torch import nn

from peft_lotra.kan import KAN, KANLinear


class Model(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.kan, self.how = KAN([3, 5, 3]), how

    def forward(self, x):
        if self.how == "forward":
            return self.kan.forward(x)
        if self.how == "layers":
            return self.kan.layers[1].forward(self.kan.layers[0].forward(x))
        if self.how == "batch first":
            return self.kan(x.contiguous().reshape(-1, 3)).view(x.shape)
        rows = x.transpose(0, 1).reshape(-1, 3)
        return self.kan(rows).view(x.shape[1], x.shape[0], 3).transpose(0, 1)


NAMES = ["default", "second", "__base__", "second"]


def model(how):
    found = adapted(Model(how))
    add(found, "second")
    return found


@pytest.mark.parametrize("how", ["forward", "layers", "batch first"])
def test_known_order(how):
    found, x = model(how), torch.rand(4, 6, 3) if how == "batch first" else torch.rand(4, 3)
    with torch.no_grad():
        y = found(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            assert apart(y[row], found(x[row : row + 1], adapter_names=[name])[0]) < 1e-6


def test_unknown_order():
    found = model("transposed")
    with pytest.raises(ValueError, match="kan.layers.0"):
        found(torch.rand(4, 6, 3), adapter_names=NAMES)


def test_a_forward_of_ones_own_set_later():
    found = adapted(nn.Sequential(KANLinear(3, 2)))
    x = torch.rand(5, 3)
    y = found(x)
    layer = found.base_model.model[0].base_layer
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    assert apart(found(x), 2 * y) < 1e-6
