# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import assert_same, snapshot
from normed import X, adapt, make
from peft import PeftModel
from safetensors.torch import load_file

from peft_lotra import LoTRAConfig


def train(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("names", [["bn"], ["0.bn"], ["1", "0.layernorm"], ["1", "2.bn", "2.layernorm"]])
def test_modules_inside_of_adapted_layers(names, tmp_path):
    model = adapt(modules_to_save=names)
    model.eval()
    with model.disable_adapter():
        y_base = model(X)
    train(model)
    y = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), y_base)
    model.save_pretrained(tmp_path)
    stored = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    for name in names:
        assert any(f"{name}.weight".replace("0.", "0.base_layer.").replace("2.", "2.base_layer.") in s for s in stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base is the one recorded
        loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(X), y)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(X), y)
    loaded.delete_adapter("default")
    assert torch.equal(loaded(X), y)
    assert list(loaded.unload().state_dict()) == list(make().state_dict())
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(merged(X), y)


def test_another_adapter_does_not_get_the_copies():
    model = train(adapt(modules_to_save=["bn"]))
    model.add_adapter("second", LoTRAConfig(r=1))
    model.set_adapter("second")
    assert torch.equal(model.eval()(X), make().eval()(X))


def test_a_copy_starts_with_the_statistics_of_the_base():
    model = train(adapt())  # which has moved them
    model.add_adapter("second", LoTRAConfig(r=1, modules_to_save=["bn", "1"]))
    model.set_adapter("second")
    assert torch.equal(model.eval()(X), make().eval()(X))


@pytest.mark.parametrize(
    "names, message",
    [
        (["head"], r"'head', which is no module of the model.*0\.layernorm"),
        (["bn", "haed"], "'haed', which is no module"),
        (["0.spline_linear"], "`spline_linear` of the layer `0`, whose coefficients are adapted"),
        (["base_linear"], "whose coefficients are adapted"),
    ],
)
def test_what_cannot_be_saved(names, message):
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        adapt(base, modules_to_save=names)
    assert_same(base, before)
    model = adapt(base)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", LoTRAConfig(r=1, modules_to_save=names))
    assert_same(model, before)


def test_an_error_while_modules_are_copied():
    """The adapted layers are in their places again."""

    class Uncopyable(torch.nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("cannot be copied")

        def forward(self, x):
            return x

    base = make()
    base[0].layernorm = Uncopyable()
    before = snapshot(base)
    with pytest.raises(RuntimeError, match="cannot be copied"):
        adapt(base, modules_to_save=["layernorm"])
    assert_same(base, before)
