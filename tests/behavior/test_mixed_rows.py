# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows of one batch with adapters of their own."""

import pytest
import torch
from behaving import KINDS, X, adapted, add, apart, net


NAMES = ["default", "__base__", "other", "other", "default", "__base__", "other", "default"]


def mixed(base):
    model = adapted(base)
    add(model, "other")
    return model


@pytest.mark.parametrize("kind", ["net", "efficient-kan", "pykan", "fast-kan", "cheby-kan"])
def test_each_row_as_by_itself(kind):
    model = mixed(net() if kind == "net" else KINDS[kind]())
    alone = {}
    with model.disable_adapter():
        alone["__base__"] = model(X).detach()
    for name in ("other", "default"):
        model.set_adapter(name)
        alone[name] = model(X).detach()
    expected = torch.stack([alone[name][row] for row, name in enumerate(NAMES)])
    assert apart(alone["default"], alone["other"]) > 1e-3 < apart(alone["default"], alone["__base__"])
    assert apart(model(X, adapter_names=NAMES), expected) < 1e-5
    assert apart(model(X, adapter_names=["__base__"] * 8), alone["__base__"]) < 1e-6
    assert torch.equal(model(X), alone["default"])


@pytest.mark.parametrize(
    ("names", "word"),
    [(NAMES[:7], "[Ll]ength"), ([*NAMES[:7], "nobody"], "nobody"), (NAMES, "train"), (NAMES, "merge")],
)
def test_what_is_refused(names, word):
    model = mixed(net()).train(word == "train")
    if word == "merge":
        model.merge_adapter()
    y = model(X)
    with pytest.raises(ValueError, match=word):
        model(X, adapter_names=names)
    assert torch.equal(model(X), y)


def test_an_adapter_without_a_head_of_its_own():
    model = adapted(modules_to_save=["head"])
    model.base_model.model.head.register_forward_pre_hook(lambda module, args: None)  # a user's
    add(model, "other")
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
    names = ["default", "other"] * 4
    mixed = model(X, adapter_names=names)
    for name in ("default", "other"):
        model.set_adapter(name)
        rows = [row for row, other in enumerate(names) if other == name]
        assert apart(mixed[rows], model(X)[rows]) < 1e-5
