# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters of other methods, which a bank does not hold, are refused: it would leave them out in silence."""

import shutil

import pytest
import torch
from helpers import refused
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lotra import AdapterBank, LoTRAConfig, load_adapters, push_to_hub
from peft_lotra.kan import KAN


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(KAN([3, 4]), nn.Linear(4, 2))


def add_lora(model, name="head"):
    config = LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name=name)


def make_model(lotra_name="default", lora_name="head"):
    model = get_peft_model(make_base(), LoTRAConfig(r=2, init_weights=False), lotra_name)
    add_lora(model.get_base_model(), lora_name)
    return model


def saved(folder, *names):
    make_model(*names).save_pretrained(folder / "model")
    return folder / "model"


def renamed(folder):
    (saved(folder) / "head").rename(folder / "model" / "other")
    return folder / "model"


def removed(folder):
    shutil.rmtree(saved(folder) / "head")
    return folder / "model"


def moved(folder):
    (saved(folder) / "head").rename(folder / "head")
    return folder / "model"


def lora_alone(folder):
    get_peft_model(make_base(), LoraConfig(r=2, target_modules=["1"])).save_pretrained(folder)
    return folder


def pushed(folder):
    push_to_hub(make_model(), "user/both")
    return "user/both"


WITH_LORA = {
    "a model": (lambda folder: make_model(), r"other methods \(peft.tuners.lora"),
    "a folder": (saved, r"other methods, \['head'\]"),
    # what was trained and saved with LoRA computes something else without it, wherever its files are now
    "a renamed folder": (renamed, r"other methods, \['head'\]"),
    "a removed folder": (removed, r"other methods, \['head'\]"),
    "a moved folder": (moved, r"other methods, \['head'\]"),
    "a neighbor of LoRA": (lambda folder: saved(folder, "anna", "head") / "anna", "other methods"),
    "a neighbor of the default": (lambda folder: saved(folder, "anna", "default") / "anna", "other methods"),
    "LoRA alone": (lora_alone, "PeftType.LORA"),
    "a repository": (pushed, r"other methods, \['head'\]"),
}


@pytest.mark.parametrize("kind", WITH_LORA)
def test_an_adapter_with_lora_is_not_added(kind, tmp_path, hub):
    bank = AdapterBank(make_base())
    make, message = WITH_LORA[kind]

    with refused(message):
        bank.add("both", make(tmp_path))

    assert bank.names == []


@pytest.mark.parametrize("selected", [["default"], None])
def test_lotra_that_is_saved_without_lora_is_added(selected, tmp_path):
    """Also over an earlier save with LoRA."""
    model = make_model()
    model.save_pretrained(tmp_path, selected_adapters=selected)
    if selected is None:
        get_peft_model(make_base(), LoTRAConfig(r=2)).save_pretrained(tmp_path)
    bank = AdapterBank(make_base())

    bank.add("alone", tmp_path)

    assert bank.names == ["alone"]


def test_a_folder_of_several_lotra_adapters_is_added(tmp_path):
    model = get_peft_model(make_base(), LoTRAConfig(r=2, init_weights=False))
    model.add_adapter("second", LoTRAConfig(r=1, init_weights=False))
    model.save_pretrained(tmp_path)
    bank = AdapterBank(make_base())

    bank.add("first", tmp_path)
    bank.add("second", tmp_path / "second")

    assert bank.names == ["first", "second"]


def test_a_base_with_lora_is_refused_before_and_after_the_bank_is_made():
    base = make_base()
    bank = AdapterBank(base)
    add_lora(base)

    with refused("The model has adapters of other methods"):
        bank.attach()
    with refused("The base has adapters of other methods"):
        AdapterBank(base)


def test_nan_in_the_file_of_another_method_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "head" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    base = make_base()

    with refused("has NaN or infinite values"):
        load_adapters(base, tmp_path)

    assert not any("lora" in name for name, _ in base.named_modules())
