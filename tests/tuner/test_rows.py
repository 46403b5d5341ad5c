# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Batches whose rows use different adapters, where layers flatten, several modules have adapters, or calls fail."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import adapt, base, inputs, lotra_layers, nested
from stand_ins import FAMILIES, ChebyKANLayer
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


NAMES = ["first", "__base__", "second", "second", "first", "__base__"]


def with_two_adapters(model, first=None, second=None):
    adapted = adapt(model, adapter_name="first", **(first or {}))
    adapted.add_adapter("second", LoTRAConfig(**{"r": 2, "init_weights": False, **(second or {})}))
    return adapted.eval()


def row_by_row(model, x, names=NAMES, repeats=1):
    """What each row gives in a batch of its adapter alone."""
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                y = model(x)
        else:
            model.set_adapter(name)
            y = model(x)
        rows.append(y.reshape(len(names), repeats, *y.shape[1:])[row])
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_by_its_adapter(family):
    model, x = with_two_adapters(base(family, torch.float64)), inputs(dtype=torch.float64)
    for names in (NAMES, ["second"] * 6, ["__base__"] * 6, ["first"] * 5 + ["second"]):
        expected = row_by_row(model, x, names)
        model.set_adapter("first")
        torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=0, atol=1e-12)
    (layer,) = lotra_layers(model).values()  # its own output is a tuple in pykan
    y, plain = layer(x, adapter_names=NAMES), layer(x)
    assert type(y) is type(plain)
    if isinstance(y, tuple):
        assert [part.shape for part in y] == [part.shape for part in plain]
        assert all(torch.allclose(a[0], b[0]) for a, b in zip(y, plain, strict=True))


def test_inputs_of_more_dimensions():
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    flat = with_two_adapters(nn.Sequential(ChebyKANLayer(3, 4, degree=3)).double())  # which flattens its input
    y = flat(x, adapter_names=NAMES)
    assert y.shape == (30, 4)
    torch.testing.assert_close(y, row_by_row(flat, x, repeats=5), rtol=0, atol=1e-12)
    model = with_two_adapters(KAN([3, 4, 2], dtype=torch.float64))
    torch.testing.assert_close(model(x, adapter_names=NAMES), row_by_row(model, x), rtol=0, atol=1e-12)


class Flattens(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.kan, self.turned = KAN([3, 2], dtype=torch.float64), turned

    def forward(self, x):
        rows, tokens, _ = x.shape
        if self.turned:
            return self.kan(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (tokens, rows)).transpose(0, 1)
        return self.kan(x.flatten(0, 1)).unflatten(0, (rows, tokens))


def test_rows_that_a_model_flattens():
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    model = with_two_adapters(Flattens(turned=False))
    torch.testing.assert_close(model(x, adapter_names=NAMES), row_by_row(model, x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):  # in an order that nobody knows
        with_two_adapters(Flattens(turned=True))(x, adapter_names=NAMES)


def test_adapters_of_other_layers_and_modules_to_save():
    model = adapt(nested().double(), adapter_name="first", target_modules=["body.0"], modules_to_save=["head"])
    second = {"target_modules": ["body.1", "tail.layers.0"], "modules_to_save": ["head"], "init_weights": False}
    model.add_adapter("second", LoTRAConfig(**second))
    for name, parameter in model.eval().named_parameters():
        if "modules_to_save.second" in name:
            parameter.data.mul_(2)
    x = inputs(dtype=torch.float64)
    torch.testing.assert_close(model(x, adapter_names=NAMES), row_by_row(model, x), rtol=0, atol=1e-12)


def test_a_call_that_fails_leaves_nothing_behind():
    model, x = with_two_adapters(KAN([3, 4, 2])), inputs()
    y = model(x)
    for names in (["first", "unknown"] * 3, ["first"] * 5, [], "first", [1] * 6):
        with pytest.raises(ValueError, match="adapter"):
            model(x, adapter_names=names)
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="last dimension of 3"):
        model(torch.randn(6, 2), adapter_names=NAMES)
    assert torch.equal(model(x), y)


def test_threads_with_names_of_their_own():
    model, x = with_two_adapters(KAN([3, 8, 2])), inputs()
    expected, wrong = {name: row_by_row(model, x, [name] * 6).detach() for name in ("first", "second")}, []
    model.set_adapter("first")

    def serve(name):
        with torch.no_grad():
            for _ in range(50):
                y = model(x, adapter_names=[name] * 6) if name else model(x)
                wrong.extend([] if torch.allclose(y, expected[name or "first"], atol=1e-5) else [name])

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("first", "second", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("in_place", [True, False])
def test_a_part_that_is_compiled(in_place):
    """Names do not reach compiled code: all rows would get the active adapter."""
    base = KAN([3, 4, 2])
    if in_place:
        base.layers[0].compile(backend="eager")
    else:
        base = nn.Sequential(torch.compile(base, backend="eager"))
    with pytest.raises(ValueError, match="do not reach compiled modules"):
        adapt(base)(inputs(), adapter_names=["__base__"] * 6)
