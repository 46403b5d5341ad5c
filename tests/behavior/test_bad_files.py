# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bad file is refused, and the model goes on as before."""

import json

import pytest
import torch
from behaving import X, adapted, layers, net, same, state
from peft import PeftModel
from safetensors.torch import load_file, save_file


CORE = "base_model.model.kan.layers.0.lotra_core"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder, change):
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.pop("integrity", None)  # changed on purpose
    (folder / CONFIG).write_text(json.dumps(config))


def refused(folder, word=None):
    """Neither a bare model nor an adapted one takes the files, and both stay what they were."""
    base, model = net(), adapted()
    before, adapted_before, y = state(base), state(model), model(X)
    with pytest.raises(Exception, match=word) as error:
        PeftModel.from_pretrained(base, folder)
    assert not isinstance(error.value, (KeyError, AttributeError, AssertionError))
    assert same(state(base), before) and not layers(base)
    with pytest.raises(type(error.value), match=word):
        model.load_adapter(folder, "other")
    assert same(state(model), adapted_before) and torch.equal(model(X), y) and list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: tensors.update(stranger=torch.ones(2)), "stranger"),
        (lambda tensors: tensors.update({"base_model.model.head.weight": torch.ones(2, 4)}), "head.weight"),
        (lambda tensors: tensors.update({CORE: torch.ones(2, 3, 5)}), "lotra_core"),
        (lambda tensors: tensors.pop(CORE), "lotra_core"),
        (lambda tensors: tensors[CORE].fill_(torch.nan), "lotra_core"),
    ],
    ids=["foreign", "of the base", "shape", "missing", "nan"],
)
def test_tensors(folder, change, word):
    change_tensors(folder, change)
    refused(folder, word)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_no_file(folder, name):
    tensors = load_file(folder / WEIGHTS)
    (folder / name).unlink()
    refused(folder, "adapter|safetensors")
    torch.save(tensors, folder / "adapter_model.bin")  # a pickle does not help
    refused(folder, "adapter|safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "LOTRA", "r": "many"}', None])
def test_broken_files(folder, text):
    (folder / CONFIG).write_text(text or (folder / CONFIG).read_text())
    if text is None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-20])
    refused(folder)
