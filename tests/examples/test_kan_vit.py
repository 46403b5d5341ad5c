# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""KAN layers as the MLPs of a transformers ViT: inputs of three dimensions, saved heads, excluded blocks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import lotra_layers
from peft import PeftModel, get_peft_model

from peft_lotra import LoTRAConfig, find_kan_layers


EXAMPLE = Path(__file__).parents[2] / "examples" / "studies" / "kan_vit.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("kan_vit", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_blocks_heads_and_rows(example, tmp_path):
    base = example.make_vit()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    assert len(find_kan_layers(base)) == 4
    config = {"exclude_modules": example.LOTRA.exclude_modules, "modules_to_save": ["classifier"]}
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False, **config), adapter_name="one")
    model.add_adapter("two", LoTRAConfig(r=3, init_weights=False, **config))
    layers = lotra_layers(model)
    assert len(layers) == 2 and all(".1." in name for name in layers)
    assert not any(name.startswith("lotra") for name, _ in model.named_parameters() if ".0.mlp" in name)

    x = torch.rand(4, 1, 8, 8)
    y = torch.tensor([3, 1, 4, 1])
    model.train()
    model(pixel_values=x, labels=y).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved and all("lotra_" in name or "classifier.modules_to_save.one" in name for name in moved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.eval()
    with torch.no_grad():
        expected = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            expected[name] = model(pixel_values=x).logits
        rows = model(pixel_values=x, adapter_names=["one", "two", "two", "one"]).logits
    for row, name in enumerate(["one", "two", "two", "one"]):
        torch.testing.assert_close(rows[row], expected[name][row])

    model.save_pretrained(tmp_path)
    fresh = example.make_vit()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=x).logits, expected["one"])
        torch.testing.assert_close(loaded.merge_and_unload()(pixel_values=x).logits, expected["one"])
