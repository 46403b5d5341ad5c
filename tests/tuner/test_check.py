# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What `check_kan_layer` says of layers, and that it leaves them as they are."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from helpers import adapt, inputs, refused
from stand_ins import LAYER_KINDS, as_model
from torch import nn

from peft_lotra import check_kan_layer, register_kan_layer
from peft_lotra.tuner.check import KANLayerReport


class Radial(nn.Module):
    def __init__(self, i=3, o=4, k=5):
        super().__init__()
        self.table, self.base = nn.Parameter(torch.randn(o, i, k)), nn.Linear(i, o)
        self.unused, self.gate = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.ones(o))
        self.centers = nn.Parameter(torch.linspace(-1, 1, k), requires_grad=False)

    def basis(self, x):
        return torch.exp(-((x[..., None] - self.centers) ** 2))

    def forward(self, x):
        return self.gate * self.sum(x)

    def sum(self, x):
        return torch.einsum("bik,oik->bo", self.basis(x), self.table) + self.base(x)


class Ungated(Radial):
    def forward(self, x):
        return self.sum(x)


def register_radial(**changes):
    description = {
        "matches": Radial,
        "coefficients": ("table", "o i k"),
        "residual": ("base.weight", "o i"),
        "bias": "base.bias",
        "grid": ("centers",),
    }
    return register_kan_layer(changes.pop("name", "radial"), **{**description, **changes})


def test_a_report_tells_roles_use_and_coverage():
    register_radial()
    report = check_kan_layer(Radial())

    assert isinstance(report, KANLayerReport)
    assert report.shape == (4, 3, 5)
    assert report.roles == {
        "table": "coefficients",
        "unused": "other",
        "gate": "other",
        "centers": "grid",
        "base.weight": "residual",
        "base.bias": "bias",
    }
    assert report.used == {name: name != "unused" for name in report.roles}
    assert report.coverage == (60 + 12) / (60 + 12 + 4 + 4)  # the unused one does not count
    assert (report.axes, report.linear) == ("outputs as described, inputs as described", "yes")

    text = str(report)

    assert re.search("unused +other +12  no\n", text)
    assert "adapters change 90.0% of the elements" in text
    assert json.loads(json.dumps(report.as_dict()))["roles"]["table"] == "coefficients"


BASIS = {"basis": lambda m, x: m.basis(x), "activation": lambda m, x: x}


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, "no, since its kind has no `basis`; general path: the layer itself runs"),
        (BASIS, "yes, by the `basis` of its kind"),
        ({**BASIS, "activation": None}, "no, since its kind has no `activation`"),
        ({**BASIS, "activation": lambda m, x: 2 * x}, "no, since the functions of its kind give other outputs"),
    ],
)
def test_a_report_tells_the_fast_path_or_why_there_is_none(changes, verdict):
    register_radial(**changes)
    assert check_kan_layer(Ungated()).fast_path.startswith(verdict)


def test_a_gate_that_is_one_now_has_no_formula_without_it():
    register_radial(**BASIS)

    assert check_kan_layer(Radial()).fast_path.startswith("no, since the functions of its kind give other outputs")


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_known_families_are_as_described(kind):
    layer = LAYER_KINDS[kind](3, 4)
    before = copy.deepcopy(layer.state_dict())
    report = check_kan_layer(layer)

    assert report.axes == "outputs as described, inputs as described"
    assert report.linear == "yes"
    assert report.coverage >= 0.85
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_adapted_layer_is_checked_with_the_inputs_of_a_user():
    model = adapt(as_model(LAYER_KINDS["efficient-kan"](3, 4)))

    assert check_kan_layer(model.base_model.model.kan, inputs(5)).kind == "efficient-kan"

    outside = check_kan_layer(model.base_model.model.kan, torch.full((5, 3), 100.0))

    assert outside.used == {"spline_weight": False, "base_weight": True, "spline_scaler": False}


class Graph(Radial):
    def forward(self, x, edges):
        return super().forward(x) + edges.sum()


def test_a_layer_that_cannot_be_run_is_not_verified():
    register_radial(matches=Graph)
    report = check_kan_layer(Graph())

    assert report.used is None
    assert report.axes.startswith("not checked: the layer raised TypeError")
    assert report.linear == "not checked"
    assert "?" in str(report)

    report = check_kan_layer(Graph(), (inputs(5), torch.ones(2, 2)))  # with all its arguments

    assert report.axes == "outputs as described, inputs as described"
    assert report.linear == "yes"
    assert report.used["table"]


def test_an_unknown_layer_is_refused_with_the_reason(no_inference):
    with refused("not a KAN layer that LoTRA knows: not now"):
        check_kan_layer(Radial())
    with refused("not a KAN layer that LoTRA knows"):
        check_kan_layer(nn.Linear(3, 4))
