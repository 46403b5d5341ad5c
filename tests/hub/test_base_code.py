# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The code of the card that builds the base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, write_model_card
from peft_lotra.kan import KAN, KANConfig, KANModel


def code_in(folder) -> str:
    """The python of the card in a folder."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def code_of(base, folder, adapter_config=None, from_files=False, **kwargs) -> str:
    model = get_peft_model(base, LoTRAConfig(r=2))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (adapter_config or {})))
    write_model_card(None if from_files else model, folder, **kwargs)
    return code_in(folder)


@pytest.mark.parametrize("kwargs", [{}, {"grid_size": 4, "spline_order": 2, "grid_range": (0.0, 2.0)}])
def test_a_kan_of_the_same_shape(tmp_path, kwargs):
    base = KAN([2, 3, 1], **kwargs)
    code = code_of(base, tmp_path)
    namespace = {}
    exec(code.split("\nmodel =")[0], namespace)
    rebuilt = namespace["base"]
    assert torch.equal(rebuilt.layers[0].grid_bounds, base.layers[0].base_layer.grid_bounds)
    assert rebuilt(torch.rand(4, 2)).shape == (4, 1) and "# now load into `base`" in code


def test_unknown_arguments(tmp_path):
    mixed = KAN([2, 3, 1])
    mixed.layers[1] = KAN([3, 1], grid_size=8).layers[0]
    for number, base in enumerate((KAN([2, 3, 1], norm="layer"), nn.Sequential(KAN([2, 1])), mixed)):
        assert "base = ...  # a " in code_of(base, tmp_path / str(number))


@pytest.mark.parametrize("from_files", [False, True])
def test_a_base_on_the_hub(tmp_path, from_files):
    base = KANModel(KANConfig(widths=(2, 4, 1)))
    code = code_of(base, tmp_path, {"revision": "v1"}, from_files, base_model="ann/kan")
    assert 'from peft_lotra.kan import KANModel\n\nbase = KANModel.from_pretrained("ann/kan", revision="v1")' in code


def test_a_base_without_from_pretrained(tmp_path):
    assert "base = KAN([2, 1]" in code_of(KAN([2, 1]), tmp_path, base_model="ann/kan")
    assert "base = ...  # a peft_lotra.kan.KAN" in code_of(KAN([2, 1]), tmp_path, None, True, base_model="ann/kan")


def test_the_code_of_the_user_stays(tmp_path):
    model = get_peft_model(KAN([2, 1]), LoTRAConfig(r=2))
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path, base_code="\nbase = mine()\n")
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path)
    assert "\n\nbase = mine()\n\nmodel = " in code_in(tmp_path)
    write_model_card(model, tmp_path, base_model="ann/kan")  # which the code did not build
    assert "mine()" not in code_in(tmp_path)


@pytest.mark.parametrize("value", ["X; print(1)", "X`\n```\n# title", 3])
def test_a_class_that_would_be_code(tmp_path, value):
    mapping = {"base_model_class": value, "parent_library": "nets"}
    code = code_of(KAN([2, 1]), tmp_path, {"auto_mapping": mapping}, True)
    assert "base = ...  # a torch.nn.Module," in code


def test_code_that_is_no_python(tmp_path):
    get_peft_model(KAN([2, 1]), LoTRAConfig(r=2)).save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    with pytest.raises(SyntaxError):
        write_model_card(None, tmp_path, base_code="base = (")
    assert (tmp_path / "README.md").read_text() == before
