# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Batches of several adapters: what is sorted, the two ways to run them, and what they cost."""

from __future__ import annotations

import pytest
import torch
from helpers import adapt, base, lotra_layers
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig, slim
from peft_lotra.kan import KAN, KANLinear
from peft_lotra.tuner import mixed_batch
from peft_lotra.tuner.mixed_batch import RowNames


def served(model, x, names):
    """Each row by itself."""
    rows = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.set_adapter(name)
            rows.append(model(row[None]))
    return torch.cat(rows)


def several(model, names="vwxyz", **configs):
    """Adapters of different ranks, scales and parts."""
    kinds = [
        {"r": 2},
        {"r": 2, "alpha": 0.3},  # which float32 cannot hold exactly
        {"r": (1, 2, 3)},
        {"r": 2, "adapt_residual": False},
        {"r": 2, "rank_dropout": 0.5},
    ]
    for position, name in enumerate(names):
        config = LoTRAConfig(init_weights=False, **kinds[position % len(kinds)], **configs)
        if position:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    return model.eval()


NAMES = ["x", "v", "__base__", "z", "w", "w", "y", "x", "v", "v", "__base__", "v", "v"]


@pytest.mark.parametrize("together", [True, False], ids=["together", "one-by-one"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_of_any_kind_in_both_ways(family, together, monkeypatch):
    model = several(base(family, torch.float64))
    x = torch.rand(13, 3, dtype=torch.float64) * 1.8 - 0.9
    expected = served(model, x, NAMES)
    ways = []
    monkeypatch.setattr(mixed_batch, "_MAX_BASIS", 2**17 if together else 0)
    for name in ("_run_together", "_run_one_by_one"):
        way = getattr(mixed_batch, name)
        monkeypatch.setattr(mixed_batch, name, lambda *args, way=way: ways.append(way.__name__) or way(*args))
    torch.testing.assert_close(model(x, adapter_names=NAMES), expected, rtol=0, atol=1e-12)
    assert ways == ["_run_together" if together else "_run_one_by_one"]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60))
def test_chunks_hold_every_row_once_with_its_own_name(names):
    names = RowNames(names)
    assert sorted(torch.cat(names.rows).tolist()) == list(range(len(names)))
    of_chunk, rows, places = names.chunks
    assert torch.equal(rows.flatten()[places], torch.arange(len(names)))
    for chunk, name in zip(rows.tolist(), of_chunk.tolist(), strict=True):
        assert {names[row] for row in chunk} == {names.distinct[name]}


def test_uneven_batches_are_not_padded_to_the_largest():
    names = RowNames(["v"] * 3000 + [f"{i}" for i in range(15) for _ in range(70)])
    assert names.chunks[1].numel() < 1.3 * len(names)


def test_the_blocks_of_a_call_do_not_change_the_result(monkeypatch):
    model = several(KAN([3, 4, 2], dtype=torch.float64))
    x = torch.rand(13, 3, dtype=torch.float64)
    expected = model(x, adapter_names=NAMES)
    monkeypatch.setattr(mixed_batch, "_MAX_BASIS", 150)  # two chunks at once
    torch.testing.assert_close(model(x, adapter_names=NAMES), expected, rtol=0, atol=1e-12)


def test_a_layer_that_vmap_does_not_go_through(monkeypatch):
    class Fickle(KANLinear):
        def forward(self, x):
            return super().forward(x) if x.abs().max() < 10 else x  # data-dependent: vmap raises a RuntimeError

    model = several(as_model(Fickle(3, 4)).double())
    x = torch.rand(13, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x, adapter_names=NAMES), served(model, x, NAMES), rtol=0, atol=1e-12)


def test_all_rows_pass_a_layer_that_none_of_the_adapters_touches():
    model = several(KAN([3, 4, 2], dtype=torch.float64), target_modules=["layers.1"])
    x = torch.rand(13, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x, adapter_names=NAMES), served(model, x, NAMES), rtol=0, atol=1e-12)


def test_gradients_reach_the_adapters_of_the_batch_alone():
    model = several(KAN([3, 4, 2], dtype=torch.float64))
    model.base_model.set_adapter(list("vwxyz"))
    x = torch.rand(4, 3, dtype=torch.float64)
    model(x, adapter_names=["v", "x", "v", "__base__"]).square().sum().backward()
    for layer in lotra_layers(model).values():
        for name in "vwxyz":
            gradients = [component.grad for component in layer.get_components(name)]
            assert all(g is not None and g.any() for g in gradients) == (name in "vx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = several(KAN([3, 4, 2])).to(dtype)
    x = torch.rand(13, 3).to(dtype)
    y = model(x, adapter_names=NAMES)
    assert y.dtype == dtype
    torch.testing.assert_close(y, served(model, x, NAMES), rtol=0.05, atol=0.05)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, adapter_names=NAMES), served(model, x, NAMES), rtol=0.05, atol=0.05)


def test_keywords_are_split_too():
    class Scaled(KANLinear):
        def forward(self, x, *, scale, power=1):
            return scale[:, None] * super().forward(x) ** power

    model = several(nn.ModuleDict({"kan": Scaled(3, 4)}).double())
    model.base_model.model.forward = lambda x, scale: model.base_model.model["kan"](x, scale=scale, power=2)
    x, scale = torch.rand(13, 3, dtype=torch.float64), torch.rand(13, dtype=torch.float64)
    y = model(x, scale, adapter_names=NAMES)
    torch.testing.assert_close(y, scale[:, None] * model(x, torch.ones_like(scale), adapter_names=NAMES))


@pytest.mark.parametrize("foreign", [False, True], ids=["slim-kan", "slim"])
def test_slim_layers(foreign):
    dense = base("efficient-kan", torch.float64) if foreign else KAN([3, 4, 2], dtype=torch.float64)
    model = several(slim(dense, (2, 2, 2)))
    x = torch.rand(13, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x, adapter_names=NAMES), served(model, x, NAMES), rtol=0, atol=1e-12)


def test_an_empty_batch():
    model = adapt(KAN([3, 4, 2]))
    assert model(torch.empty(0, 3), adapter_names=[]).shape == (0, 2)


def test_rows_whose_adapter_has_no_module_of_its_own_get_that_of_the_base():
    model = adapt(nn.Sequential(KAN([3, 4]), nn.Linear(4, 2)), modules_to_save=["1"])
    model.add_adapter("without", LoTRAConfig(r=2, init_weights=False))
    model.base_model.model[1].modules_to_save["default"].weight.data.add_(1)
    names, x = ["default", "without", "__base__", "without"], torch.rand(4, 3)
    y = model(x, adapter_names=names)
    for name, row, expected in zip(names, x, y, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                torch.testing.assert_close(model(row[None])[0], expected)
        else:
            model.set_adapter(name)
            torch.testing.assert_close(model(row[None])[0], expected)


class Tokens(nn.Module):
    """Tokens, flattened into the rows of the KAN layers, as in U-KAN, kan-gpt and TimeKAN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = FAMILIES["efficient-kan"](3, 5), nn.Linear(5, 2)
        self.second = FAMILIES["cheby-kan"](5, 5)

    def forward(self, x, scale=None):
        batch, tokens, _ = x.shape
        y = self.first(x.reshape(batch * tokens, -1))
        y = self.second(y).view(batch, tokens, -1)
        return self.head(y.flatten(0, 1)).view(batch, tokens, -1)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("names", [["a", "b", "a", "__base__"], ["b", "b", "a", "a"], ["a"] * 4])
def test_rows_that_are_a_multiple_of_the_batch(names, together, monkeypatch):
    if not together:
        monkeypatch.setattr("peft_lotra.tuner.mixed_batch._MAX_BASIS", 0)
    model = adapt(Tokens(), adapter_name="a", modules_to_save=["head"])
    model.add_adapter("b", LoTRAConfig(r=3, init_weights=False, modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["b"].weight.mul_(2)
    model.eval()
    x = torch.rand(4, 6, 3)
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[row : row + 1])
        else:
            model.set_adapter(name)
            expected = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 6, 8])
def test_names_are_for_the_batch_and_not_for_the_rows_of_a_layer(count):
    """Two names for four inputs are a mistake, and not names of pairs."""
    model = adapt(Tokens(), adapter_name="a")
    with pytest.raises(
        ValueError, match=f"Length of `adapter_names` should be .*, but got {count} and 4 respectively"
    ):
        model(torch.rand(4, 6, 3), adapter_names=["a"] * count)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x=torch.rand(4, 6, 3), scale=torch.tensor(2.0), adapter_names=["a"] * count)


def test_longer_names_are_made_once():
    names = RowNames(["a", "b"])
    assert names.for_rows(2) is names and names.for_rows(3) is names and names.for_rows(0) is names
    longer = names.for_rows(6)
    assert longer == ["a", "a", "a", "b", "b", "b"] and names.for_rows(6) is longer
    assert RowNames([]).for_rows(4) == []


@pytest.mark.parametrize("names", ["vvv", b"vvv", None, 3, ["v", None, "v"], [["v"]] * 3, torch.zeros(3)], ids=repr)
def test_names_that_are_no_list_of_strings(names):
    model = several(as_model(KANLinear(3, 2)), "vw")
    x = torch.rand(3, 3)
    expected = model(x)
    if names is not None:  # which asks for nothing
        with pytest.raises(ValueError, match="`adapter_names` must be a list"):
            model(x, adapter_names=names)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x, adapter_names=("v", "v", "v")), expected)
