# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import pytest
import torch
from jet_helpers import assert_same, nested, network, points
from torch import nn

from peft_lotra.derivatives import stages
from peft_lotra.derivatives.stages import Entry, register, stages_of
from peft_lotra.kan import KAN, KANLinear, jet


def doubled(base):
    """A subclass that computes something else."""
    return type("Doubled", (base,), {"forward": lambda self, x: 2 * base.forward(self, x)})


class Centered(nn.Module):
    """A module without state whose outputs depend on all entries of a row."""

    def forward(self, x):
        return torch.tanh(x - x.mean(-1, keepdim=True))


def hooked():
    model = network()
    model.layers[1].register_forward_pre_hook(lambda module, args: None)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: doubled(KAN)([3, 2]),
        lambda: doubled(KANLinear)(3, 2),
        lambda: doubled(nn.Sequential)(network()),
        lambda: nn.Sequential(network(), nn.Softmax(-1)),
        lambda: nn.Sequential(),
        lambda: nn.Bilinear(3, 3, 2),
        hooked,
        lambda: nn.Sequential(nn.Linear(3, 2), Centered()),
        lambda: network(norm="batch").train(),
    ],
)
def test_modules_that_are_no_chain_have_no_stages(make):
    assert stages_of(make()) is None


def test_a_subclass_without_a_forward_of_its_own_is_a_chain():
    chain = type("Chain", (nn.Sequential,), {})
    bend = type("Bend", (nn.Tanh,), {})
    model, x = chain(network(), bend()), points(20)

    assert len(stages_of(model)) == len(stages_of(network())) + 1
    assert_same(jet(model, x), nested(model, x))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = network()

    def forward(self, x):
        return self.inside(1 * x)


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = KANLinear(2, 1, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x) / 2


def halved(module):
    (stage,) = stages_of(module.layer)
    formula = stage.formula
    half = formula._replace(coefficients=formula.coefficients / 2, residual=formula.residual / 2)
    return [stage._replace(formula=half)]


def test_registered_modules_have_closed_jets(monkeypatch):
    monkeypatch.setattr(stages, "_entries", dict(stages._entries))
    model, x = nn.Sequential(Wrapper(), Halved()), points(80)
    assert stages_of(model) is None

    register(Wrapper, Entry(inner=lambda wrapper: wrapper.inside))
    register(Halved, Entry(halved))

    assert len(stages_of(model)) == 4
    assert_same(jet(model, x), nested(model, x))
