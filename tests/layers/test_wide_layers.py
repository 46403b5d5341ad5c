# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Wide layers are recognized by small copies, and get what they would get without them."""

import pytest
import torch
from orders import Flat, Layer, Wavelets
from stand_ins import FastKANLayer, FixedFunctions, OldEfficientKANLayer
from torch import nn

from peft_lotra import find_kan_layers


def counting(cls):
    """Return a class whose calls are counted by the number of inputs."""

    class Counting(cls):
        widths = ()

        def forward(self, x):
            Counting.widths += (x.shape[-1],)
            return super().forward(x)

    return Counting


def recognize(layer):
    (row,) = find_kan_layers(nn.Sequential(layer))
    return row


@pytest.mark.parametrize("cls, runs", [(OldEfficientKANLayer, 1), (FastKANLayer, 1), (Layer, 0), (Wavelets, 0)])
@pytest.mark.parametrize("sizes", [(100, 80), (80, 160), (128, 128)])
def test_a_wide_layer_runs_at_its_size_for_its_values_only(cls, runs, sizes):
    layer = counting(cls)(*sizes)

    row = recognize(layer)

    assert row.shape[:2] == sizes[::-1]
    assert layer.widths.count(sizes[0]) == runs
    assert row.runs_by == ("formula" if runs else "forward")


@pytest.mark.parametrize("order", ["o i k", "i o k", "k i o", "i k o"])
def test_a_square_layer_of_any_order_is_read_in_its_order(order):
    row = recognize(Layer(70, 70, 5, order, residual="io"))

    assert (row.shape, row.parameters) == ((70, 70, 5), ("A", "base"))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (Flat(100, 70, inner="ki"), (70, 100, 4)),
        (Flat(10, 80, first=False), (80, 10, 4)),
        (FixedFunctions(100, 70), (70, 100, 6)),
        (FixedFunctions(66, 132, inner="k i"), (132, 66, 6)),
        (FixedFunctions(65, 1), (1, 65, 6)),
        (FixedFunctions(20, 200), (200, 20, 6)),
    ],
)
def test_functions_and_inputs_in_one_axis_are_told_apart(layer, shape):
    assert recognize(layer).shape == shape


class ByConstants(Layer):
    """A layer whose size stands in its code."""

    def forward(self, x):
        return super().forward(x.reshape(-1, 100)).reshape(-1, 70)


def test_a_layer_with_its_size_in_its_code_runs_at_its_size():
    assert recognize(ByConstants(100, 70)).shape == (70, 100, 5)


class ClampedIfWide(OldEfficientKANLayer):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1) if self.in_features > 64 else x)


def test_a_layer_that_is_another_one_at_its_size_has_no_formula():
    assert recognize(ClampedIfWide(100, 70)).runs_by == "forward"
    assert recognize(ClampedIfWide(50, 70)).runs_by == "formula"


class Experts(nn.Module):
    """A mixture of experts, whose gates depend on all inputs: no KAN layer."""

    def __init__(self, i, o):
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.randn(o, i, 4)), nn.Parameter(torch.randn(4, i))

    def forward(self, x):
        return torch.einsum("bi,oik,bk->bo", torch.tanh(x), self.experts, (x @ self.gate.T).softmax(-1))


@pytest.mark.parametrize("sizes", [(100, 80), (128, 128)])
def test_wide_experts_are_refused(sizes):
    assert not find_kan_layers(nn.Sequential(Experts(*sizes)))


def test_parameters_that_are_tied_stay_so():
    class Tied(Layer):
        def __init__(self):
            super().__init__(100, 70)
            self.again = self.A

        def forward(self, x):
            return super().forward(x) * self.again.square().mean()

    class Apart(Tied):
        def __init__(self):
            super().__init__()
            self.again = nn.Parameter(self.A.detach().clone())

    assert not find_kan_layers(nn.Sequential(Tied()))
    assert recognize(Apart()).parameters == ("A",)
