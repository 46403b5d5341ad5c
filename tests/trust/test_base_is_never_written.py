# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Nothing of the base is ever written by a file; whatever legitimate use there is, is opt-in and undone."""

from __future__ import annotations

import warnings

import pytest
import safetensors.torch
import torch
from hostile import WEIGHTS, assert_refused, edit_config, state_of
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


class WordsConfig(PretrainedConfig):
    model_type = "words-for-trust-tests"


class Words(PreTrainedModel):
    """A KAN on embedded words, with an output that may be tied to them."""

    config_class = WordsConfig
    base_model_prefix = "words"

    def __init__(self, config=None):
        super().__init__(config or WordsConfig(vocab_size=7, tie_word_embeddings=False))
        state = torch.get_rng_state()
        torch.manual_seed(5)
        self.embed = nn.Embedding(7, 3)
        self.kan = KAN([3, 4, 3])
        self.unembed = nn.Linear(3, 7, bias=False)
        torch.set_rng_state(state)
        self.all_tied_weights_keys = {}

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.unembed

    def forward(self, x):
        return self.unembed(self.kan(self.embed(x)))


WORDS = torch.arange(6).view(2, 3)
EMBEDDINGS = ["embed", "unembed"]


def saved(folder, overwrite):
    model = get_peft_model(Words(), LoTRAConfig(r=2, init_weights=False)).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name in overwrite:
        tensors[f"base_model.model.{name}.weight"] = torch.full_like(
            model.get_submodule(f"base_model.model.{name}").weight, 9.0
        )
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit_config(folder)
    return folder


def embeddings(model):
    return [model.embed.weight.detach().clone(), model.unembed.weight.detach().clone()]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("names", [["embed"], ["unembed"], EMBEDDINGS])
def test_a_file_does_not_write_embeddings(tmp_path, names):
    folder, base = saved(tmp_path / "a", names), Words()
    before = embeddings(base)
    try:
        PeftModel.from_pretrained(base, folder)
    except ValueError as error:
        assert names[0] in str(error)
    assert same(embeddings(base), before)


def test_beside_another_adapter(tmp_path):
    folder = saved(tmp_path / "a", EMBEDDINGS)
    model = get_peft_model(Words(), LoTRAConfig(r=2, init_weights=False), adapter_name="first").eval()
    y = model(WORDS)
    try:
        model.load_adapter(folder, "second")
    except ValueError:
        pass
    assert torch.equal(model(WORDS), y)


def test_into_an_adapter_that_is_there(tmp_path):
    folder = saved(tmp_path / "a", EMBEDDINGS)
    model = get_peft_model(Words(), LoTRAConfig(r=2, init_weights=False)).eval()
    before = embeddings(model.get_base_model())
    try:
        model.load_adapter(folder, "default")
    except ValueError:
        pass
    assert same(embeddings(model.get_base_model()), before)


@pytest.mark.parametrize("way", ["delete", "unload", "disable", "another"])
def test_what_was_written_is_undone(tmp_path, way):
    """However it may be allowed: without the adapter, the model is its base."""
    folder, base = saved(tmp_path / "a", EMBEDDINGS), Words()
    y = base(WORDS)
    model = get_peft_model(base, LoTRAConfig(r=2), adapter_name="first").eval()
    try:
        model.load_adapter(folder, "second")
    except ValueError:
        return
    model.set_adapter("second")
    if way == "delete":
        model.delete_adapter("second")
        model.set_adapter("first")
    elif way == "unload":
        model = model.unload()
    elif way == "another":
        model.set_adapter("first")
    if way == "disable":
        with model.disable_adapter():
            assert torch.equal(model(WORDS), y)
    else:
        assert torch.equal(model(WORDS), y)


def test_the_whole_base_after_a_load(tmp_path):
    folder, base = saved(tmp_path / "a", EMBEDDINGS), Words()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    try:
        model = PeftModel.from_pretrained(base, folder)
    except ValueError:
        return
    model.unload()
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# passes already: what is no embedding is refused by name
@pytest.mark.parametrize("save_embedding_layers", [True, "auto"])
@pytest.mark.parametrize("saved_whole", [None, ["embed"]])
def test_saving_writes_no_embeddings_of_the_base(tmp_path, saved_whole, save_embedding_layers):
    """Embeddings travel by `modules_to_save` alone, and are undone with the adapter."""
    model = get_peft_model(Words(), LoTRAConfig(r=2, init_weights=False, modules_to_save=saved_whole)).eval()
    if saved_whole:
        model.embed.weight.data.add_(1.0)
    parameters = [*model.state_dict()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    said = [str(warning.message) for warning in caught if "save_embedding_layers" in str(warning.message)]
    assert (len(said) == 1 and "modules_to_save" in said[0]) == (save_embedding_layers is True)
    assert [*model.state_dict()] == parameters
    names = [name for name in safetensors.torch.load_file(tmp_path / WEIGHTS) if "embed" in name]
    assert bool(names) == bool(saved_whole) and not any("original" in name for name in names)
    base = Words()
    y, before = base(WORDS), embeddings(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(loaded(WORDS), model(WORDS)) and not torch.equal(loaded(WORDS), y)
    with loaded.disable_adapter():
        assert torch.equal(loaded(WORDS), y)
    loaded.delete_adapter("default")
    assert same([base.get_input_embeddings().original_module.weight if saved_whole else base.embed.weight], before[:1])


def test_the_error_names_the_way(tmp_path):
    with pytest.raises(ValueError, match="embed.weight is nothing that this adapter has .*`modules_to_save`"):
        PeftModel.from_pretrained(Words(), saved(tmp_path / "a", ["embed"]))


@pytest.mark.parametrize("name", ["kan.layers.0.spline_weight", "kan.layers.0.base_layer.spline_weight"])
def test_coefficients(tmp_path, name):
    folder, base = saved(tmp_path / "a", []), Words()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors[f"base_model.model.{name}"] = torch.zeros_like(base.kan.layers[0].spline_weight)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit_config(folder)
    assert_refused(lambda: PeftModel.from_pretrained(base, folder), base, error=ValueError, match=name)
    assert state_of(base)
