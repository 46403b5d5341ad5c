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

import peft_lotra
from peft_lotra import LoTRAConfig, create_lotra_optimizer, extract_lotra, hotswap_adapter, slim
from peft_lotra.kan import KAN, KANLinear, SlimKAN, jet
from peft_lotra.optim import LevenbergMarquardt


def refused(call, match: str) -> None:
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
    "adapted Slim": lambda: get_peft_model(SlimKAN([3, 4, 2], ranks=2), LoTRAConfig(r=2)),
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
    "not loaded": lambda: slim(KAN([6, 8, 4], device="meta"), 2),
    "coefficients": lambda: peft_lotra.register_kan_layer("x", matches=nn.Linear, coefficients=(1, 2)),
}


@pytest.mark.parametrize("words", CALLS)
def test_a_wrong_argument_is_refused_by_this_package(words):
    before = snapshot(BASE)
    refused(CALLS[words], words.strip())

    assert_same(BASE, before)


TAKE_A_MODEL = {
    "slim": lambda model: slim(model, energy=0.9),
    "to_dense": peft_lotra.to_dense,
    "find_kan_layers": peft_lotra.find_kan_layers,
    "extract_lotra": lambda model: extract_lotra(model, BASE, 2),
    "update_spectrum": lambda model: peft_lotra.update_spectrum(model, BASE),
    "model_summary": peft_lotra.model_summary,
    "check_kan_layer": peft_lotra.check_kan_layer,
    "create_lotra_optimizer": lambda model: create_lotra_optimizer(model, torch.optim.Adam, lr=0.01),
    "hotswap_adapter": lambda model: hotswap_adapter(model, "folder"),
    "refit_adapters": lambda model: peft_lotra.refit_adapters(model, torch.zeros(2, 3)),
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
