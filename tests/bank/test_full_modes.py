# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters with full modes, which have no factor there, beside others in a bank and in mixed batches."""

import copy
import itertools
import random

import pytest
import torch
from helpers import X, adapt, assert_equal, assert_near, bank_of, net, row_by_row
from peft import PeftModel, get_peft_model_state_dict

from peft_lotra import AdapterBank
from peft_lotra.kan import KAN


FULL = {"r": ("full", "full", 1)}
FORMS = {
    "shape": FULL,
    "splines": {**FULL, "adapt_residual": False},
    "dense": {"r": "full", "alpha": 0.3},
    "dense splines": {"r": "full", "adapt_residual": False},
    "factors": {"r": (2, 1, 3)},
    "inputs": {"r": (1, "full", 2)},
    "outputs": {"r": ("full", 1, "full")},
}


def bank_of_forms(base, names):
    return bank_of(base, {name: FORMS[name] for name in names})


def shapes(model):
    return {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}


def forms_of(bank, name):
    updates, _ = bank.snapshot.updates_of(name)
    return {layer: update.tensor.form for layer, update in updates.items()}


def check_rows(bank, alone):
    """Check that rows have the values of the model of their adapter, in any order, in groups and one by one."""
    models = {**alone, "__base__": copy.deepcopy(bank.base)}
    model = bank.attach()

    for count in (8, 300):
        names = random.Random(0).choices(list(models), k=count)
        x = torch.rand(count, 3) * 1.8 - 0.9
        with torch.no_grad():
            y = model(x, adapter_names=names)
        assert_near(y, row_by_row(models, names, x))
    bank.detach()


def test_full_modes_have_no_columns():
    bank, alone = bank_of_forms(KAN([3, 5, 3, 1]), ["shape"])

    tensors = get_peft_model_state_dict(alone["shape"]).values()
    assert bank.snapshot.packed.shape[1] == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("forms", list(itertools.permutations(["shape", "factors", "splines"])), ids=", ".join)
def test_files_and_growing_keep_the_forms(tmp_path, forms):
    """Whichever form comes first, and with an adapter of another layer alone."""
    base = net()
    bank, alone = bank_of_forms(base, forms[:1])
    alone["one layer"] = adapt(copy.deepcopy(base), target_modules=["layers.1"], **FULL)
    bank.add("one layer", alone["one layer"])
    bank.save(tmp_path / "first")
    bank = AdapterBank.load(base, tmp_path / "first")
    for name in forms[1:]:
        alone[name] = adapt(copy.deepcopy(base), **FORMS[name])
        bank.add(name, alone[name])
    bank.save(tmp_path / "second")
    loaded = AdapterBank.load(base, tmp_path / "second")
    other = AdapterBank(base)
    for name in reversed(bank.names):
        other.add(name, loaded)

    for copied in (bank, other):
        check_rows(copied, alone)
    contents = [copied.snapshot.gather(list(bank.snapshot.ids)) for copied in (bank, loaded)]
    assert_equal(*contents)
    for name, model in alone.items():
        assert forms_of(loaded, name) == forms_of(other, name) == forms_of(bank, name)
        other.export(name, tmp_path / name)
        exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        assert shapes(exported) == shapes(model)
        assert_near(exported.eval()(X), model(X))


@pytest.mark.parametrize("names", [["shape"], ["splines", "dense"], ["factors", "outputs"]], ids=", ".join)
@pytest.mark.parametrize("removed", ["dense", "factors"])
def test_a_compacted_bank_has_no_room_for_removed_adapters(names, removed, tmp_path):
    """Its file is as large as that of a bank that never had them."""
    bank, alone = bank_of_forms(KAN([3, 5, 1]), [removed, *names])
    other = AdapterBank(bank.base)
    for name in set(bank.names) - {removed}:
        other.add(name, bank)

    bank.remove(removed)
    bank.compact()

    sizes = []
    for kept in (bank, other):
        kept.save(tmp_path)
        sizes.append((tmp_path / "adapter_bank.safetensors").stat().st_size)
    assert sizes[0] == pytest.approx(sizes[1], abs=16)  # digits of checksums
    check_rows(bank, {name: alone[name] for name in bank.names})


@pytest.mark.parametrize("name", FORMS)
def test_a_state_dict_says_the_form(name):
    """Its ranks and sizes: with the base branch or without."""
    bank, alone = bank_of_forms(net(), [name])
    before = bank.snapshot.updates_of(name)[0]

    bank.add(name, get_peft_model_state_dict(alone[name]), alpha=FORMS[name].get("alpha", 1.0), replace=True)

    check_rows(bank, alone)
    for layer, update in bank.snapshot.updates_of(name)[0].items():
        assert update.tensor.form == before[layer].tensor.form
        assert update.tensor.shape == before[layer].tensor.shape
