# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapter takes the place of another one."""

import pytest
import torch
from behaving import X, adapted, add, apart, net, same, state
from peft import PeftModel

from peft_lotra import hotswap_adapter
from peft_lotra.kan import KAN


def test_the_weights_are_replaced(tmp_path):
    model, other = adapted(), adapted()
    other.save_pretrained(tmp_path)
    y = model(X)
    hotswap_adapter(model, tmp_path)
    assert same(state(model), state(other)) and torch.equal(model(X), other(X)) and not torch.equal(model(X), y)


def test_lower_ranks_are_filled_up(tmp_path):
    model, other = adapted(r=3), adapted(r=2)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, target_rank=3)
    assert apart(model(X), other(X)) < 1e-6
    assert model.base_model.model.kan.layers[0].lotra_r["default"] == (3, 3, 3)


def test_layers_that_were_renamed(tmp_path):
    """A file fits the model that it was loaded into under other names, in whatever order."""
    adapted(r=2, modules_to_save=["head", "norm"], base=headed("kan")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="other names"):
        model = PeftModel.from_pretrained(headed("backbone"), tmp_path)
    model.peft_config["default"].modules_to_save = ["norm", "head"]
    before = state(model)
    with pytest.warns(UserWarning, match="other names"):
        hotswap_adapter(model, tmp_path)
    assert same(state(model), before)


def headed(name):
    model = torch.nn.Module()
    model.add_module(name, KAN([3, 4]))
    model.head, model.norm = torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)
    return model


@pytest.mark.parametrize("target_rank", [0, -1, "4", (4, 4, 4)])
def test_a_wrong_target_rank(tmp_path, target_rank):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="positive int"):
        hotswap_adapter(adapted(), tmp_path, target_rank=target_rank)


def test_one_of_several_and_another_alpha(tmp_path):
    model, other = adapted(), adapted(alpha=3.0)
    other.save_pretrained(tmp_path)
    add(model, "second", r=(2, 3, 4), alpha=0.5)
    first = model(X)
    hotswap_adapter(model, tmp_path, "second")
    assert torch.equal(model(X), first)
    model.set_adapter("second")
    assert apart(model(X), other(X)) < 1e-5


OTHERS = [{"r": 2}, {"target_modules": ["layers.1"]}, {"adapt_residual": False}, {"base": net(hidden=5)}]
REFUSED = [*[(other, "layers.0") for other in OTHERS], ({"modules_to_save": ["head"]}, "head")]


@pytest.mark.parametrize(("config", "word"), [*REFUSED, ({}, "nobody"), ({}, "merged")])
def test_what_is_refused(tmp_path, config, word):
    adapted(**config).save_pretrained(tmp_path)
    model = adapted()
    if word == "merged":
        model.merge_adapter()
    before, y = state(model), model(X)
    with pytest.raises(ValueError, match=word):
        hotswap_adapter(model, tmp_path, "nobody" if word == "nobody" else "default")
    assert same(state(model), before) and torch.equal(model(X), y)


def test_a_compiled_base(tmp_path):
    model = adapted(torch.compile(net()))
    y = model(X)
    model.save_pretrained(tmp_path)
    other = adapted(torch.compile(net()))
    hotswap_adapter(other, tmp_path)
    assert torch.equal(other(X), y)
