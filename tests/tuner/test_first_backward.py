# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers import inputs, nested
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


class Heads(nn.Module):
    """Three heads, of which a loss may take any."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = KAN([3, 4]), nn.ModuleList(KAN([4, 2]) for _ in range(3))

    def forward(self, x, chosen=(0, 1, 2)):
        x = self.body(x)
        return [self.heads[index](x) for index in chosen]


def adapt(model=None, **config):
    return get_peft_model(model or Heads(), LoTRAConfig(r=(1, 2, 2), **config))


def backward(model, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sum(y.square().sum() for y in model(inputs(), *args)).backward()
    return [str(warning.message) for warning in caught if "no gradient" in str(warning.message)]


@pytest.mark.parametrize("config", [{}, {"init_weights": False}])
def test_layers_without_a_gradient_are_named_once(config):
    model = adapt(**config)
    (message,) = backward(model, (1,))
    assert "heads.0.layers.0, heads.2.layers.0: " in message and "heads.1" not in message and "body" not in message
    assert not backward(model, (0,))


def test_nothing_is_said_where_all_have_one():
    model = adapt()
    assert not backward(model)
    assert not backward(model, (1,))  # later passes are not looked at


def test_gradients_that_are_asked_for_are_no_backward_pass():
    model = adapt()
    loss = sum(y.sum() for y in model(inputs(), (1,)))
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert backward(model, (1,))


def test_frozen_adapters_are_left_out():
    model = adapt()
    for name, parameter in model.named_parameters():
        if "heads.0" in name or "heads.2" in name:
            parameter.requires_grad = False
    assert not backward(model, (1,))


def test_each_adapter_has_a_first_pass():
    model = adapt()
    assert backward(model, (1,))
    model.add_adapter("second", LoTRAConfig(r=1))
    assert not backward(model, (0,))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    """A re-entrant one runs a backward pass for a part of the layers, which says nothing of the others."""

    class Checkpointed(Heads):
        def forward(self, x, chosen=(0, 1, 2)):
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=reentrant)
            return [checkpoint(self.heads[index], x, use_reentrant=reentrant) for index in chosen]

    assert not backward(adapt(Checkpointed()))


def test_copies():
    model = adapt()
    copied = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert backward(model, (1,))
    for other in copied:
        assert not backward(other, (1,))  # a copy has no hooks


def test_one_layer_alone_is_not_watched():
    assert not backward(adapt(_Single()))


class _Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 2])

    def forward(self, x):
        return [self.kan(x)]


def test_large_adapters_warn():
    with pytest.warns(
        UserWarning, match=r"more parameters than .* adapt: layers\.1 \(ranks \(1, 8, 8\): 201 instead of 72\)\."
    ):
        get_peft_model(KAN([40, 8, 1]), LoTRAConfig(r=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(nested(), LoTRAConfig(r=1))
        get_peft_model(KAN([40, 8, 1]), LoTRAConfig(r=8, rank_pattern={"layers.1": (1, 2, 2)}))


def test_candidates_are_named():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.splines = nn.Parameter(torch.zeros(4, 3, 7))
            self.conv = nn.Conv1d(3, 4, 3)

    model = nn.ModuleDict({"layer": Unknown(), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"Candidates are `layer` \(Unknown: `splines` \(4, 3, 7\)\)\. If one of"):
        get_peft_model(model, LoTRAConfig())
    with pytest.raises(ValueError, match=r"If one of the modules is a KAN layer, describe it"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoTRAConfig())
