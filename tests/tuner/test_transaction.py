# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc
import inspect
import threading
from collections import OrderedDict

import pytest
import torch
from helpers import adapt, assert_same, nested, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, LoTRAModel
from peft_lotra.locks import IN_PROGRESS
from peft_lotra.tuner.transaction import base_parameters, enclose, transaction


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_not_finished_is_put_back(error):
    model = nested()
    model.notes, model.order, model.names = ["one"], OrderedDict(a=1, b=2), {"x"}
    before, weight, names = snapshot(model), model.head.weight, list(model._modules)
    config = LoTRAConfig(r=2)
    with pytest.raises(error), transaction(model, [weight], [config]), torch.no_grad():
        weight.zero_().requires_grad_(False)
        weight.data = torch.zeros(1)
        model.head = nn.Tanh()
        model.extra = nn.Linear(1, 1)
        model.notes.append("two")
        model.order.move_to_end("a")
        model.names.add("y")
        config.r = 7
        model.eval()
        raise error
    assert_same(model, before)
    assert model.head.weight is weight and list(model._modules) == names
    assert (model.notes, list(model.order), model.names, config.r) == (["one"], ["a", "b"], {"x"}, 2)
    with transaction(model, [weight]):
        model.notes.append("two")
    assert model.notes == ["one", "two"]


def test_an_end_that_is_not_reached_undoes_nothing_later():
    """As where Ctrl-C arrives between the block and its end."""
    model = nested()
    block = transaction(model)
    block.__enter__()
    model.notes = ["one"]
    del block
    assert model.notes == ["one"]


def test_the_parameters_that_a_merge_of_another_method_writes():
    """Layers of LoTRA undo their merges themselves."""
    linear = nn.Linear(2, 2)
    lora = get_peft_model(nn.Sequential(OrderedDict(lin=linear)), LoraConfig(target_modules=["lin"])).base_model
    assert list(map(id, base_parameters(lora, merged_only=False))) == list(map(id, linear.parameters()))
    assert not list(base_parameters(lora, merged_only=True))
    lora.merge_adapter()
    assert list(map(id, base_parameters(lora, merged_only=True))) == list(map(id, linear.parameters()))
    model = adapt(nested(), target_modules=["body.0", "body.1"])
    assert not list(base_parameters(model, merged_only=False))


def test_models_of_other_methods_pass_through():
    """What PEFT leaves behind for another method is as without this package."""

    model = get_peft_model(nn.Sequential(OrderedDict(lin=nn.Linear(2, 2))), LoraConfig(target_modules=["lin"]))
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("missing")
    model.add_adapter("other", LoraConfig(target_modules=["lin"]))
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and "_change_lock" not in vars(model.base_model)


def test_methods_of_peft_are_enclosed_once():
    method = PeftModel.load_adapter
    enclose([PeftModel], LoTRAModel, LoTRAConfig)
    assert inspect.unwrap(PeftModel.load_adapter) is inspect.unwrap(method) is method.__wrapped__
    assert "model_id" in inspect.signature(PeftModel.load_adapter).parameters


def test_one_change_at_a_time():
    """A load that fails beside another one does not undo it."""
    model = adapt(nested())
    within, release = threading.Event(), threading.Event()

    class Slow(LoTRAConfig):
        def record_base_by(self, method):
            within.set()
            release.wait(20)
            raise ValueError("fails late")

    def fail():
        with pytest.raises(ValueError, match="fails late"):
            model.add_adapter("bad", Slow(r=1))

    failing = threading.Thread(target=fail)
    failing.start()
    assert within.wait(20)
    adding = threading.Thread(target=lambda: model.add_adapter("good", LoTRAConfig(r=1)))
    adding.start()
    adding.join(0.2)
    assert adding.is_alive()
    release.set()
    failing.join(20)
    adding.join(20)
    assert list(model.peft_config) == ["default", "good"]
    assert all(list(layer.lotra_core) == ["default", "good"] for layer in model.modules() if hasattr(layer, "lotra_r"))


def test_a_transaction_that_is_never_left_is_forgotten():
    """As after Ctrl-C at the end of its block: a later fork must not undo what has been done since."""
    before = len(IN_PROGRESS)
    begun = transaction(nested())
    begun.__enter__()
    assert len(IN_PROGRESS) == before + 1
    del begun
    gc.collect()
    assert len(IN_PROGRESS) == before
