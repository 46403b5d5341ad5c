# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A save that would lose an adapter is refused before it writes; a reading of the state is not."""

import pytest
import torch
from behaving import X, adapted, net, same, state
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from peft_lotra import LoTRAConfig, save_adapter


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
def test_values_that_are_not_finite(tmp_path, save):
    model = adapted()
    save(model, tmp_path)
    before = content(tmp_path)
    model.base_model.model.kan.layers[0].lotra_core["default"].data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.0.lotra_core"):
        save(model, tmp_path)
    assert content(tmp_path)["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert any(t.isnan().any() for t in get_peft_model_state_dict(model).values())


def test_a_model_that_was_merged_away(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    model.merge_and_unload()  # its result is thrown away
    with pytest.raises(ValueError, match="no LoTRA layers"):
        model.save_pretrained(tmp_path)
    assert content(tmp_path)["adapter_model.safetensors"] == before["adapter_model.safetensors"]


def test_a_part_of_a_tensor(tmp_path):
    """FSDP spreads tensors over processes."""
    model = adapted()
    tensors = model.state_dict()
    key = "base_model.model.kan.layers.1.lotra_factor_in.default"
    tensors[key] = tensors[key].flatten()[:5]  # as FSDP's views
    with pytest.raises(ValueError, match=r"layers.1.lotra_factor_in.default is spread over several processes"):
        model.save_pretrained(tmp_path / "adapter", state_dict=tensors)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.json"))


def test_a_save_of_parts_by_hand(tmp_path):
    """Tensors that were edited after the save load with a warning."""
    from safetensors.torch import load_file, save_file

    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="changed"):
        loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert not torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("name", ["head", "weight", "model"])
def test_a_name_that_files_could_not_have(name):
    """PEFT would write `head.head.weight` as `weight`."""
    base, model = net(), adapted(modules_to_save=["head"])
    config = LoTRAConfig(r=2, modules_to_save=["head"])
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        get_peft_model(base, config, adapter_name=name)
    assert same(state(base), state(net()))
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        model.add_adapter(name, config)
    assert list(model.peft_config) == ["default"]
