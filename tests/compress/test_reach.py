# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy

import pytest
import torch
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import slim
from peft_lotra.compress.reach import check_copy
from peft_lotra.kan import KAN


X = torch.rand(60, 6, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
LAYERS: list[nn.Module] = []


class Block(nn.Module):
    """A block as minGPT's: `mlpf` is a function that holds a dict of layers."""

    def __init__(self, family: str = "own", how: str = "closure") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleDict({"c_fc": FAMILIES[family](6, 12), "c_proj": FAMILIES[family](12, 6)})
        m, first = self.mlp, self.mlp["c_fc"]
        if how == "closure":
            self.mlpf = lambda x: m["c_proj"](m["c_fc"](x))
        elif how == "self":
            self.mlpf = lambda x: self.mlp["c_proj"](self.mlp["c_fc"](x))
        elif how == "list":
            self.steps = [lambda x, m=m: m["c_fc"](x), lambda x, m=m: m["c_proj"](x)]
            self.mlpf = lambda x: x
        elif how == "layer":
            self.mlpf = lambda x: m["c_proj"](first(x))
        elif how == "global":
            LAYERS[:] = [first]
        elif how == "method":
            self.mlpf = self.run
        self.how = how

    def run(self, x):
        return self.mlp["c_proj"](self.mlp["c_fc"](x))

    def forward(self, x):
        if self.how == "global":
            return x + self.mlp["c_proj"](LAYERS[0](x))
        if self.how == "list":
            return x + self.steps[1](self.steps[0](x))
        return x + self.mlpf(x)


@pytest.mark.parametrize("inputs", [None, X])
@pytest.mark.parametrize("how", ["closure", "self", "list", "layer"])
def test_a_copy_that_would_call_the_original_is_refused(how, inputs):
    model = Block(how=how)
    y = model(X)
    with pytest.raises(ValueError, match=r"is a function that holds a \w+ of the model.*inplace=True"):
        slim(model, (2, 2, 2), inputs=inputs)
    assert torch.equal(model(X), y) and not hasattr(model, "slim_report")


@pytest.mark.parametrize("family", ["own", "efficient-kan"])
@pytest.mark.parametrize("how", ["closure", "self", "list", "method"])
@pytest.mark.parametrize("options", [{"ranks": (4, 4, 3)}, {"energy": 0.9}, {"budget": 300}])
def test_in_place(family, how, options):
    model = Block(family, how)
    y, state = model(X).detach(), copy.deepcopy(model.state_dict())
    small = slim(model, inputs=X, inplace=True, **options)
    report = small.slim_report
    assert small is model and report.errors and report.model_error == pytest.approx(error(small, y), rel=1e-3)
    if how != "method":
        with pytest.raises(ValueError, match="inplace=True"):
            small.to_dense()
    dense = small.to_dense(inplace=True)
    assert dense is model and dense.state_dict().keys() == state.keys() and not hasattr(dense, "slim_report")
    assert error(dense, y) == pytest.approx(report.model_error, rel=1e-3)


def error(model, y):
    return ((model(X) - y).norm() / (y - y.mean(0)).norm()).item()


@pytest.mark.parametrize("inputs, options", [(None, {"ranks": 2}), (X, {"ranks": 2}), (X, {"energy": 0.9})])
@pytest.mark.parametrize("family", ["own", "efficient-kan"])
def test_a_layer_that_is_held_itself_cannot_be_exchanged(family, inputs, options):
    model = Block(family, "layer")
    y, state = model(X), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"holds the layer `mlp\.c_fc` itself"):
        slim(model, inputs=inputs, inplace=True, **options)
    assert torch.equal(model(X), y) and model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("family", ["own", "efficient-kan"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_that_is_called_in_another_way(inplace, family):
    """A global is seen by no search, but with inputs by what is called."""
    model = Block(family, "global")
    y, state = model(X), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(reaches|does not call).*c_fc"):
        slim(model, 2, inputs=X, inplace=inplace)
    assert model.state_dict().keys() == state.keys() and torch.equal(model(X), y)


def test_a_layer_cannot_be_exchanged_in_the_place_of_the_model():
    layer = KAN([6, 4]).layers[0]
    with pytest.raises(ValueError, match="itself a KAN layer, which cannot be exchanged in place"):
        slim(layer, 2, inplace=True)


def test_functions_without_layers_are_no_obstacle():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.kan, self.dropout = KAN([6, 8, 6]), nn.Dropout(0.0)
            dropout = self.dropout
            self.after = lambda x, scale=2.0: dropout(x) * scale

        def forward(self, x):
            return self.after(self.kan(x))

    model = Network()
    check_copy(model)
    assert slim(model, 3, inputs=X).slim_report.errors.keys() == {"kan.layers.0", "kan.layers.1"}
