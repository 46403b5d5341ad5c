# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Arguments that make no sense, given to public functions: clear errors of this package, and nothing changed."""

import copy
import math

import pytest
import torch
from helpers import assert_same, snapshot
from peft import get_peft_model
from torch import nn
from torch.nn.functional import mse_loss

import peft_lotra
from peft_lotra import (
    AdapterBank,
    LoTRAConfig,
    create_lotra_optimizer,
    extract_lotra,
    fit_adapter,
    hotswap_adapter,
    start_from_gradient,
)
from peft_lotra.kan import KAN, KANLinear, SlimKAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


def refused(call, match):
    """That a call raises an error of this package, in words that match, and not of what it calls."""
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        call()
    last = caught.traceback[-1]
    assert "peft_lotra" in str(last.path) and str(last.statement).strip().startswith("raise"), caught.getrepr()


LAYERS = {
    "KANLinear": lambda: KANLinear(3, 2),
    "KAN": lambda: KAN([3, 4, 2], norm="layer"),
    "SlimKAN": lambda: SlimKAN([3, 4, 2], ranks=2),
    "adapted": lambda: get_peft_model(KAN([3, 4, 2]), LoTRAConfig(r=2)),
}
INPUTS = {
    "None": None,
    "integers": torch.zeros(2, 3, dtype=torch.long),
    "last dimension": torch.zeros(2, 5),
    "no dimension": torch.tensor(1.0),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_input_is_refused(name, kind):
    layer = LAYERS[name]()
    refused(lambda: layer(INPUTS[kind]), "input")
    refused(lambda: jet(layer, INPUTS[kind]), "`x`|input")


@pytest.mark.parametrize("name", LAYERS)
def test_another_dtype_is_refused_and_no_rows_are_run(name):
    layer = LAYERS[name]()
    refused(lambda: layer(torch.zeros(2, 3, dtype=torch.float64)), "cast one of them")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.zeros(2, 3, dtype=torch.bfloat16))
    layer(torch.zeros(0, 3)).sum().backward()


BASE, X = KAN([3, 4, 2]), torch.linspace(-0.9, 0.9, 15).view(5, 3)


CALLS = {
    "budget": lambda: extract_lotra(copy.deepcopy(BASE), KAN([3, 4, 2]), budget=math.nan),
    r"`data` is \{'x': ": lambda: fit_adapter(BASE, {"x": X, "y": X}, mse_loss, progress=False),
    "coefficients": lambda: peft_lotra.register_kan_layer("x", matches=nn.Linear, coefficients=(1, 2)),
}


@pytest.mark.parametrize("words", CALLS)
def test_a_wrong_argument_is_refused_by_this_package(words):
    before = snapshot(BASE)
    refused(CALLS[words], words)

    assert_same(BASE, before)


def adapted():
    return get_peft_model(KAN([3, 4, 2], device="meta"), LoTRAConfig(r=2))


WITHOUT_VALUES = {
    "fit_adapter": lambda: fit_adapter(KAN([3, 2], device="meta"), (X, X), mse_loss),
    "start_from_gradient": lambda: start_from_gradient(adapted(), lambda: X.sum()),
    "AdapterBank": lambda: AdapterBank(KAN([3, 2], device="meta")),
    "add": lambda: AdapterBank(BASE).add("a", adapted()),
    "merge_adapter": lambda: adapted().merge_adapter(),
    "merge_and_unload": lambda: adapted().merge_and_unload(safe_merge=True),
    "save_pretrained": lambda: adapted().save_pretrained("new"),
    "extract_lotra": lambda: extract_lotra(BASE, KAN([3, 4, 2], device="meta"), 2),
    "add_weighted_adapter": lambda: adapted().add_weighted_adapter(["default"], [1.0], "sum"),
    "LevenbergMarquardt": lambda: LevenbergMarquardt(adapted()),
}


@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_a_model_without_values_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    refused(WITHOUT_VALUES[name], "has no values.* on the meta device")
    assert not list(tmp_path.glob("new/*"))


TAKE_A_MODEL = {
    "find_kan_layers": peft_lotra.find_kan_layers,
    "extract_lotra": lambda model: extract_lotra(model, BASE, 2),
    "update_spectrum": lambda model: peft_lotra.update_spectrum(model, BASE),
    "create_lotra_optimizer": lambda model: create_lotra_optimizer(model, torch.optim.Adam, lr=0.01),
    "hotswap_adapter": lambda model: hotswap_adapter(model, "folder"),
    "save_adapter": lambda model: peft_lotra.save_adapter(model, "folder"),
    "jet": lambda model: jet(model, torch.zeros(2, 3)),
    "LevenbergMarquardt": LevenbergMarquardt,
}


@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_what_is_no_model_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)

    for thing in (3, "model", KAN, [BASE], BASE.state_dict(), torch.zeros(2)):
        with pytest.raises((TypeError, ValueError), match="model|base|tuned|layer"):
            TAKE_A_MODEL[name](thing)
    assert not list(tmp_path.iterdir())
