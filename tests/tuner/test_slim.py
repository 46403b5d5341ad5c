# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on Slim layers, whose coefficients are Tucker tensors already."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model

from peft_lotra import LoTRAConfig, LoTRALayer, create_lotra_optimizer, preprocess_lotra, slim


RANKS = (5, 6, 3)


@pytest.fixture(params=["own", "efficient-kan", "pykan", "cheby-kan"])
def small(request):
    torch.manual_seed(0)
    return slim(as_model(FAMILIES[request.param](12, 10)).eval(), RANKS)


def points():
    return torch.rand(6, 12) * 1.8 - 0.9


def adapted(model, **config):
    return get_peft_model(copy.deepcopy(model), LoTRAConfig(r=(3, 3, 2), init_weights=False, **config)).eval()


def tensor_of(model):
    """The coefficients of the layer `kan`."""
    return adapted(model).base_model.model.kan.get_base_weight()


@pytest.mark.parametrize("adapt_residual", [True, False])
def test_the_equivalent_tensor_is_adapted(small, adapt_residual):
    x, model = points(), adapted(small, adapt_residual=adapt_residual)
    layer = model.base_model.model.kan
    assert isinstance(layer, LoTRALayer)
    y, delta = model(x), layer.get_delta_weight("default")
    dense = model.merge_and_unload()
    assert type(dense.kan) is type(small.to_dense().kan)
    expected = tensor_of(small).clone()
    expected[..., : delta.shape[-1]] += delta
    torch.testing.assert_close(tensor_of(dense), expected)
    assert relative(dense(x), y) < 1e-5


def test_starts_as_the_base_trains_and_is_saved(small, tmp_path):
    x, model = points(), get_peft_model(copy.deepcopy(small), LoTRAConfig(r=2))
    assert relative(model(x), small(x)) < 1e-6
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    before = {n: p.clone() for n, p in model.named_parameters() if "lotra_" not in n}
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert relative(model(x), small(x)) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)
    assert torch.equal(loaded(x), model.eval()(x))
    with model.disable_adapter():
        assert torch.equal(model(x), small(x))


def test_merging_and_back(small):
    x, model = points(), adapted(small)
    model.add_adapter("other", LoTRAConfig(r=2, init_weights=False))
    y = model(x)
    model.merge_adapter()
    assert relative(model(x), y) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(x), small(x))
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    model.merge_adapter(["default", "other"])
    both = model(x)
    model.unmerge_adapter()
    for name in ("default", "other"):  # one after the other
        model.merge_adapter([name])
    assert relative(model(x), both) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


def test_copied_and_cast_while_merged(small):
    model, x = adapted(small), points()
    y = model.double()(x.double())
    model.merge_adapter()
    model = copy.deepcopy(model).float().double()
    model.unmerge_adapter()
    assert relative(model(x.double()), y) < 1e-6
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_broken_adapters_and_dropout(small):
    x, model = points(), adapted(small, rank_dropout=0.5, module_dropout=0.5).train()
    assert torch.stack([model(x) for _ in range(8)]).std(0).max() > 0
    with torch.no_grad():
        model.base_model.model.kan.lotra_core["default"].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("start", ["gradient", "hosvd"])
def test_starts_that_look_at_the_base(small, start):
    """They are those of the dense layer of the same coefficients."""
    x, y, spans = points(), None, []
    for model in (small, small.to_dense()):
        config = LoTRAConfig(r=(10, 3, 99), init_weights=start)
        if start == "gradient":
            preprocess_lotra(model, config, lambda model=model: model(x).square().sum().backward())
        y = model(x)
        tuned = get_peft_model(model, config)
        assert relative(tuned(x), y) < 1e-5
        factor = tuned.base_model.model.kan.lotra_factor_in["default"].detach()
        spans.append(factor @ torch.linalg.pinv(factor))
    torch.testing.assert_close(*spans, rtol=0, atol=1e-3)


@pytest.mark.parametrize("trainable", [True, False])
def test_unloading_frees_what_was_free(small, trainable):
    base = copy.deepcopy(small).requires_grad_(trainable)
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False))
    model.merge_adapter()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lotra_" not in n)
    merged = copy.deepcopy(model).merge_and_unload()
    model.unmerge_adapter()
    for unloaded in (merged, model.unload()):
        free = {p.requires_grad for n, p in unloaded.named_parameters() if "grid" not in n}
        assert free == {trainable}
