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
