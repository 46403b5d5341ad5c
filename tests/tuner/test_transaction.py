# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from helpers import adapt, assert_same, nested, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.modules.locks import IN_PROGRESS
from peft_lotra.tuner.transaction import base_parameters, is_part_of_change, transaction


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


def test_attributes_of_some_modules_and_the_flags_of_all():
    model = nested()
    with suppress(KeyError), transaction(model, changes=lambda module: module is model.head):
        model.note = model.head.note = "changed"
        model.requires_grad_(False)
        raise KeyError
    assert model.note == "changed" and not hasattr(model.head, "note")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_may_begin_with_the_first_change_that_is_a_part_of_it():
    """As in `from_pretrained`, where what other methods leave behind stays."""
    model = nested()
    with suppress(KeyError), transaction(model, begins=False):
        model.note = "of another method"
        raise KeyError
    with suppress(KeyError), transaction(model, begins=False):
        assert is_part_of_change(model) and not is_part_of_change(model.head)
        model.note = "of this one"
        raise KeyError
    assert model.note == "of another method" and not is_part_of_change(model)


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
