# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Without `r`, each layer gets the largest ranks up to 4 that take fewer numbers than its coefficients."""

import json
import warnings

import pytest
import torch
from behaving import layers
from peft import PeftModel, get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


@pytest.mark.parametrize("widths", [[2, 5, 1], [2, 8, 8, 1], [64, 32], [1, 1]])
def test_fewer_numbers(widths, tmp_path):
    kan = KAN(widths)
    state = {name: value.clone() for name, value in kan.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(kan, LoTRAConfig(init_weights=False))
    for layer in layers(model).values():
        ranks, size = layer.lotra_r["default"], layer.get_base_weight().numel()
        assert max(ranks) <= 4 and min(ranks) >= 1
        assert layer.get_components("default").numel() < size or ranks == (1, 1, 1)
        if widths == [64, 32]:
            assert ranks == (4, 4, 4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(map(tuple, saved.values())) == sorted(layer.lotra_r["default"] for layer in layers(model).values())
    base = KAN(widths)
    base.load_state_dict(state)
    x = torch.rand(4, widths[0])
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


def test_an_explicit_rank_stays():
    with pytest.warns(UserWarning, match="more parameters"):
        model = get_peft_model(KAN([2, 5, 1]), LoTRAConfig(r=4))
    assert [layer.lotra_r["default"] for layer in layers(model).values()] == [(4, 2, 4), (1, 4, 4)]


def test_inputs_far_outside_of_the_grid():
    model = get_peft_model(KAN([2, 5, 1]), LoTRAConfig())
    with pytest.warns(UserWarning, match="layers.0.*outside"):
        model(torch.full((8, 2), 50.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.full((8, 2), 50.0))  # once
        get_peft_model(KAN([2, 5, 1]), LoTRAConfig())(torch.rand(8, 2) * 2 - 1)


def test_a_typo_among_targets():
    with pytest.warns(UserWarning, match="layer.1"):
        get_peft_model(KAN([2, 5, 1]), LoTRAConfig(target_modules=["layers.0", "layer.1"]))
