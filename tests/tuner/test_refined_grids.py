# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`refine_grid` of an adapted network carries all of its adapters to the finer grids, exactly."""

import copy

import pytest
import torch
from helpers import add_adapter, assert_equal, components, refused
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, refine_grid


X = 1.2 * (2 * torch.rand(200, 2, dtype=torch.float64) - 1)


def network(**kwargs):
    return KAN([2, 6, 1], grid_size=4, dtype=torch.float64, **kwargs)


def adapted(kan):
    model = get_peft_model(kan, LoTRAConfig(r=(2, 2, 3), init_weights=False))
    add_adapter(model, "other", adapt_residual=False)
    return model.eval()


def outputs(model):
    with torch.no_grad():
        for name in ("other", "default"):
            model.set_adapter(name)
            yield model(X)
        with model.disable_adapter():
            yield model(X)


@pytest.mark.parametrize("exact", [False, True])
def test_all_adapters_are_carried_over_to_refined_grids(exact, tmp_path):
    model = adapted(network())
    for layer in model.base_model.model.layers:  # so wide that no activation leaves it
        layer.base_layer.grid_bounds.mul_(1 if exact else 40)
        layer.remember_grid()
    before = list(outputs(model))
    for size in (8, 60 if exact else 16):  # several levels; the grids were extended to 12 and 20
        refine_grid(model, size, X if exact else None)

    for y, expected in zip(outputs(model), before, strict=True):
        assert_close(y, expected, rtol=1e-11, atol=1e-12)

    layer = model.base_model.model.layers[0]

    assert layer.base_layer.grid_size >= 16
    assert layer.lotra_r["default"] == (2, 2, 3)
    assert layer.get_components("other").factor_basis.shape == (layer.base_layer.grid.num_basis, 2)
    assert {name for name, part in components(model) if part.requires_grad} == {
        name for name, _ in components(model) if name.endswith("default")
    }

    model(X).square().mean().backward()  # and is trained further

    assert all(part.grad.any() for name, part in components(model) if name.endswith("default"))

    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()

    assert_equal(PeftModel.from_pretrained(base, tmp_path).eval()(X), model(X))


REFUSED = {
    "a multiple of the old ones, .4, 4.": lambda model: refine_grid(model, 6),
    "Unmerge its adapters": lambda model: refine_grid(model, 8),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_refused_refinement_changes_nothing(words):
    model = adapted(network())
    if "Unmerge" in words:
        model.merge_adapter()

    with refused(words, model):
        REFUSED[words](model)
