# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters with linear paths in a bank."""

import copy

import pytest
import torch
from helpers import refused
from peft import PeftModel, get_peft_model
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from peft_lotra import AdapterBank, LinearPath, LoTRAConfig, start_from_data
from peft_lotra.kan import KAN


X = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_base():
    torch.manual_seed(0)
    return LinearPath(KAN([3, 6, 2], dtype=torch.float64))


def make_models(base):
    models = {}
    for number, name in enumerate(("a", "b", "c")):
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, init_weights=False))
        start_from_data(model, X, X[:, :2] * (number + 1) + base(X).detach() * 0.5 + number, mse_loss)
        models[name] = model.eval()
    return models


@pytest.fixture
def base():
    return make_base()


def outputs_of(models, base, names):
    outputs = {"__base__": base(X), **{name: model(X) for name, model in models.items()}}
    return torch.stack([outputs[name][row] for row, name in enumerate(names)])


@pytest.mark.filterwarnings("ignore:The start overwrites")
@pytest.mark.parametrize("source", ["model", "folder", "bank", "export"])
def test_each_row_gets_its_own_path(base, source, tmp_path):
    models = make_models(base)
    names = ["a", "__base__", "c", "b"] * 10
    expected = outputs_of(models, base, names)
    bank = AdapterBank(base)
    for name, model in models.items():
        if source != "model":
            model.save_pretrained(tmp_path / name)
        bank.add(name, model if source == "model" else tmp_path / name)
    if source == "bank":
        bank.save(tmp_path / "bank")
        bank = AdapterBank.load(base, tmp_path / "bank")
    if source == "export":
        bank.export("c", tmp_path / "exported")
        loaded = PeftModel.from_pretrained(make_base(), tmp_path / "exported")
        assert_close(loaded(X), models["c"](X))

    model = bank.attach()

    assert_close(model(X, adapter_names=names), expected)
    assert_close(model(X), base(X))
    assert model(X[:0], adapter_names=[]).shape == (0, 2)
    bank.detach()
    assert_close(base(X), outputs_of({}, base, ["__base__"] * 40))


@pytest.mark.filterwarnings("ignore:The start overwrites")
def test_a_bank_of_a_network_without_a_path_refuses_them(base, tmp_path):
    (model, *_) = make_models(base).values()
    plain = AdapterBank(base.network)
    with refused("the path of a `LinearPath`"):
        plain.add("a", model, check_base="ignore")
    bank = AdapterBank(base)
    bank.add("a", model)
    bank.save(tmp_path)

    with pytest.raises(ValueError, match="linear paths"):
        AdapterBank.load(base.network, tmp_path)
