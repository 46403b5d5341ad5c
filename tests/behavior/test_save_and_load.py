# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What is saved is what is loaded; a save that would lose an adapter is refused before it writes."""

import pytest
import torch
from helpers import X, adapt, add_adapter, assert_equal, assert_near, load, lotra_layers, net, refused, state
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lotra import LoTRAConfig, save_adapter


def components(model):
    return {name: tensor for name, tensor in state(model).items() if "lotra_" in name}


def test_a_loaded_adapter_has_the_same_bits(tmp_path):
    model = adapt(rank_pattern={"layers.1": (1, 2, 3)}, alpha_pattern={"layers.0": 0.5}, alpha=2.0)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)

    assert_equal(components(loaded), components(model))

    settings = [(layer.lotra_r["default"], layer.lotra_alpha["default"]) for layer in lotra_layers(loaded).values()]

    assert settings == [((2, 3, 4), 0.5), ((1, 2, 3), 2.0)]
    assert_equal(loaded(X), model(X))

    low = load(tmp_path, low_cpu_mem_usage=True)

    assert_equal(components(low), components(model))
    assert_near(low(X), model(X))


def test_the_file_has_only_the_adapter(tmp_path):
    model = adapt()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")

    assert len(tensors) == 7
    assert all(".lotra_" in name for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == model.get_nb_trainable_parameters()[0]
    with refused("safe"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not list(tmp_path.rglob("*.bin"))


def test_several_adapters_are_saved_in_one_folder(tmp_path):
    model = adapt()
    add_adapter(model, "other")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert_equal(loaded.eval()(X), model(X))
    model.save_pretrained(tmp_path / "selected", selected_adapters=["other"])

    assert {path.name for path in (tmp_path / "selected").iterdir()} - {"README.md"} == {"other"}


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(tmp_path):
    adapt().save_pretrained(tmp_path)
    frozen = load(tmp_path)

    assert not any(p.requires_grad for p in frozen.parameters())

    loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}

    assert trained == components(loaded).keys()


def test_saved_modules_are_loaded_with_their_adapter(tmp_path):
    model = adapt(modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight += 1
    model.save_pretrained(tmp_path)

    assert any("head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))

    loaded = load(tmp_path)

    assert_equal(loaded(X), model(X))

    with loaded.disable_adapter():
        assert_near(loaded(X), net()(X))


def test_a_state_dict_is_set_whole_or_in_part():
    model, other = adapt(), adapt()
    tensors, before = get_peft_model_state_dict(model), state(other)

    assert len(tensors) == 7
    assert not any("default" in name for name in tensors)

    nan = {name: tensor * torch.nan for name, tensor in tensors.items()}

    with refused("not finite", other):
        set_peft_model_state_dict(other, nan)

    result = set_peft_model_state_dict(other, {name: t for name, t in tensors.items() if "layers.1" in name})

    assert any("layers.0.lotra_core" in key for key in result.missing_keys)  # a part is loaded, the rest reported

    changed = {name for name, value in state(other).items() if not torch.equal(value, before[name])}

    assert changed
    assert all("layers.1" in name for name in changed)

    set_peft_model_state_dict(other, tensors)

    assert_equal(other(X), model(X))


@pytest.mark.parametrize("change", ["components", "saved module"])
def test_state_dicts_of_other_shapes_change_nothing(change):
    model, other = (
        adapt(modules_to_save=["head"]),
        adapt(r=1 if change == "components" else None, modules_to_save=["head"]),
    )
    tensors = get_peft_model_state_dict(model)
    if change == "saved module":
        tensors["base_model.model.head.weight"] = torch.zeros(5, 6)

    with refused(r"shape \(.*instead of", other):
        set_peft_model_state_dict(other, tensors)


def test_mismatched_sizes_can_be_ignored(tmp_path):
    """As with PEFT's LoRA: tensors of other shapes keep the values of a new adapter."""
    model = adapt(modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    base = net()
    base.head = nn.Linear(base.head.in_features, 7)
    with refused("head.*instead of"):
        PeftModel.from_pretrained(base, tmp_path)

    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)

    assert loaded(X).shape[-1] == 7
    assert_equal(components(loaded), components(model))


class WithEmbedding(nn.Module):
    """A model with the methods of transformers that PEFT looks for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 3)
        self.kan = net()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return None

    def forward(self, tokens):
        return self.kan(torch.tanh(self.embed(tokens)))


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["embed"]}])
def test_embeddings_of_the_base_are_not_saved(tmp_path, config):
    """PEFT adds them if they were resized, and loading would overwrite those of the base."""
    model, tokens = adapt(WithEmbedding(), **config), torch.arange(6)
    model.save_pretrained(tmp_path, save_embedding_layers=True)

    loaded = PeftModel.from_pretrained(WithEmbedding(), tmp_path).eval()

    assert_equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("attach", [adapt, lambda: inject_adapter_in_model(LoTRAConfig(), net())])
def test_state_dicts_with_parameters_of_the_base_change_nothing(attach):
    model, other = adapt(), attach()

    with refused("is a parameter of the base", other):
        set_peft_model_state_dict(other, model.state_dict())


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
def test_values_that_are_not_finite_are_not_saved(tmp_path, save):
    model = adapt()
    save(model, tmp_path)
    before = content(tmp_path)
    model.base_model.model.kan.layers[0].lotra_core["default"].data[0, 0, 0] = torch.nan

    with refused("layers.0.lotra_core"):
        save(model, tmp_path)
    assert content(tmp_path)["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert any(t.isnan().any() for t in get_peft_model_state_dict(model).values())


def test_a_model_that_was_merged_away_is_not_saved(tmp_path):
    model = adapt()
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    model.merge_and_unload()  # its result is thrown away

    with refused("no LoTRA layers"):
        model.save_pretrained(tmp_path)
    assert content(tmp_path)["adapter_model.safetensors"] == before["adapter_model.safetensors"]


def test_a_part_of_a_tensor_is_not_saved(tmp_path):
    """FSDP spreads tensors over processes."""
    model = adapt()
    tensors = model.state_dict()
    key = "base_model.model.kan.layers.1.lotra_factor_in.default"
    tensors[key] = tensors[key].flatten()[:5]  # as FSDP's views

    with refused(r"layers.1.lotra_factor_in.default is spread over several processes"):
        model.save_pretrained(tmp_path / "adapter", state_dict=tensors)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.json"))


def test_tensors_edited_after_the_save_are_a_warning(tmp_path):
    """Tensors that were edited after the save load with a warning."""
    model = adapt()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")

    with pytest.warns(UserWarning, match="changed"):
        loaded = load(tmp_path)
    assert not torch.equal(loaded(X), model(X))
