# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapter takes the place of another one."""

import pytest
import torch
from behaving import X, adapted, add, apart, net, same, state

from peft_lotra import hotswap_adapter


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
