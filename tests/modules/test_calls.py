# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import adapt
from torch import nn

from peft_lotra.kan import KAN
from peft_lotra.modules.calls import call_with_parameters, modes_kept, set_mode, share_hooks, unwrap


@pytest.mark.parametrize(
    "wrap",
    [
        lambda kan: kan,
        adapt,
        lambda kan: adapt(kan).base_model,
        lambda kan: torch.compile(adapt(kan)),
        lambda kan: nn.DataParallel(torch.compile(kan)),
    ],
)
def test_unwrap(wrap):
    kan = KAN([2, 3, 1])
    assert unwrap(wrap(kan)) is kan


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), modes_kept(model):
        model.eval()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


class Loop(nn.Sequential):
    def train(self, data, steps=3):
        raise AssertionError("nobody asked for it")


class Frozen(nn.Sequential):
    """Stays in evaluation mode, but for its last module."""

    def train(self, mode=True):
        super().train(False)
        self[-1].train(mode)
        return self


def test_the_mode_of_a_model_whose_train_is_a_loop():
    model = nn.Sequential(Loop(nn.Dropout(), Loop(nn.Dropout())), nn.Dropout())
    for mode in (False, True):
        set_mode(model, mode)
        assert {module.training for module in model.modules()} == {mode}


def test_the_mode_of_a_model_that_decides_it_itself():
    model = nn.Sequential(Frozen(nn.Dropout(), nn.Dropout()))
    set_mode(model, True)
    assert [module.training for module in model.modules()] == [True, False, False, True]


@pytest.mark.parametrize("view", [False, True], ids=["parameter", "view of FSDP"])
def test_parameters_are_exchanged_for_one_call(view):
    layer = nn.Linear(2, 1, bias=False)
    if view:  # FSDP hides the parameter behind a tensor in `__dict__`
        layer.__dict__["weight"] = layer._parameters["weight"].detach()
    weight = layer.weight
    calls = {"layer": layer, "function": lambda x: 2 * layer(x)}
    ones = {"weight": torch.ones(1, 2)}
    results = [call_with_parameters(layer, ones, call, (torch.ones(3, 2),), {}) for call in calls.values()]
    assert torch.equal(results[0], torch.full((3, 1), 2.0)) and torch.equal(results[1], torch.full((3, 1), 4.0))
    with pytest.raises(RuntimeError):
        call_with_parameters(layer, ones, layer, (torch.ones(3, 5),), {})
    assert layer.weight is weight


def test_shared_hooks_run_and_full_backward_hooks_stay_full():
    old, new, calls = nn.Linear(2, 2), nn.Linear(2, 2), []
    old.register_forward_pre_hook(lambda *_: calls.append("before"))
    old.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True)
    old.register_full_backward_hook(lambda _, of_inputs, __: calls.append(len(of_inputs)))
    share_hooks(old, new)
    new(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", 1]
