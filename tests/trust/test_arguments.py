# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Arguments that make no sense, given to layers and functions: clear errors, and nothing changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hostile import X, adapted
from hostile import assert_raised_here as refused
from peft import get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    extract_lotra,
    save_adapter,
    slim,
    write_model_card,
)
from peft_lotra.kan import (
    KAN,
    KANConfig,
    KANLinear,
    KANModel,
    KnotMap,
    SlimKAN,
    SlimKANLinear,
    TanhBound,
    bspline_basis,
    hessian,
    jet,
    laplacian,
)
from peft_lotra.optim import LevenbergMarquardt


##########################
# Inputs of layers       #
##########################

LAYERS = {
    "KANLinear": lambda: KANLinear(3, 2),
    "KAN": lambda: KAN([3, 4, 2]),
    "batch": lambda: KAN([3, 4, 2], norm="batch").eval(),
    "layer": lambda: KAN([3, 4, 2], norm="layer"),
    "tanh": lambda: KAN([3, 4, 2], norm="tanh"),
    "SlimKANLinear": lambda: SlimKANLinear(3, 2, ranks=1),
    "SlimKAN": lambda: SlimKAN([3, 4, 2], ranks=2),
    "KANModel": lambda: KANModel(KANConfig(widths=[3, 4, 2])),
    "TanhBound": lambda: TanhBound(3),
    "KnotMap": lambda: KnotMap(-torch.ones(3), torch.ones(3), torch.ones(3, 4)),
    "adapted": lambda: get_peft_model(KAN([3, 4, 2]), LoTRAConfig(r=2)),
    "adapted Slim": lambda: get_peft_model(SlimKAN([3, 4, 2], ranks=2), LoTRAConfig(r=2)),
    "adapted KANModel": lambda: get_peft_model(KANModel(KANConfig(widths=[3, 4, 2])), LoTRAConfig(r=2)),
}
INPUTS = {
    "None": None,
    "list": [[0.0, 0.0, 0.0]],
    "number": 3,
    "text": "x",
    "dict": {"x": torch.zeros(2, 3)},
    "array": torch.zeros(2, 3).numpy(),
    "integers": torch.zeros(2, 3, dtype=torch.long),
    "booleans": torch.zeros(2, 3, dtype=torch.bool),
    "complex": torch.zeros(2, 3, dtype=torch.complex64),
    "last dimension": torch.zeros(2, 5),
    "no dimension": torch.tensor(1.0),
    "sparse": torch.zeros(2, 3).to_sparse(),
    "sparse rows": torch.zeros(2, 3).to_sparse_csr(),
    "nested": torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)]),
}
DTYPES = [torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_input(name, kind):
    layer = LAYERS[name]()
    refused(lambda: layer(INPUTS[kind]), "input")
    for derivative in (jet, laplacian, hessian):
        refused(lambda derivative=derivative: derivative(layer, INPUTS[kind]), "`x`|input")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("TanhBound", "KnotMap")])
def test_inputs_of_another_dtype(name, dtype):
    layer = LAYERS[name]()
    refused(lambda: layer(torch.zeros(2, 3, dtype=dtype)), "cast one of them")
    if dtype == torch.float64:
        refused(lambda: jet(layer, torch.zeros(2, 3, dtype=dtype)), "cast one of them")


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_takes_any_dtype(name):
    layer = LAYERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.zeros(2, 3)), layer(torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_no_rows(name, shape):
    y = LAYERS[name]()(torch.zeros(shape))
    y = getattr(y, "logits", y)
    assert y.shape[:-1] == shape[:-1]
    if y.requires_grad:
        y.sum().backward()


@pytest.mark.parametrize("directions", [3, "x", [[1, 0, 0]]])
def test_directions(directions):
    for derivative in (jet, hessian):
        refused(lambda derivative=derivative: derivative(KAN([3, 2]), X, directions), "directions")


##########################
# Networks               #
##########################


@pytest.mark.parametrize("widths", [3, None, "22", [True, 1], [2.5, 1], [2], []], ids=repr)
def test_widths(widths):
    for make in (KAN, lambda widths: SlimKAN(widths, 2), lambda widths: KANConfig(widths=widths)):
        refused(lambda make=make: make(widths), "widths")


@pytest.mark.parametrize(
    "argument",
    [
        {"dtype": torch.int32},
        {"dtype": torch.complex64},
        {"dtype": "float32"},
        {"dtype": torch.float8_e4m3fn},
        {"grid_range": None},
        {"grid_range": 3},
        {"grid_range": ("a", "b")},
        {"grid_range": (None, 1)},
        {"norm": []},
        {"norm": 3},
    ],
    ids=repr,
)
def test_arguments_of_networks(argument):
    refused(lambda: KAN([2, 3, 1], **argument), *argument)


@pytest.mark.parametrize("ranks", [(1, 2, 3, 4), [[1, 1, 1, 1], None]], ids=repr)
def test_dense_layers_have_no_kernel(ranks):
    """Four ranks were taken, and the last one dropped."""
    refused(lambda: SlimKAN([2, 3, 1], ranks), "three of them")
    if isinstance(ranks, tuple):
        refused(lambda: SlimKANLinear(2, 3, ranks), "three of them")
        refused(lambda: slim(KAN([6, 8, 4]), ranks), "three of them")


@pytest.mark.parametrize(
    "labels", [3, [0, 1], torch.tensor([0, 1, 2, 0]), torch.tensor([-1, 0, 1, 0]), torch.zeros(4, dtype=torch.cfloat)]
)
def test_labels(labels):
    model = KANModel(KANConfig(widths=[3, 4, 2]))
    refused(lambda: model(torch.rand(4, 3), labels=labels), "labels")
    assert model(torch.rand(4, 3), labels=torch.tensor([0, 1, -100, 0])).loss.isfinite()


@pytest.mark.parametrize("value", [None, 3, "x", [[1.0]], torch.ones(3, 3, dtype=torch.long)], ids=repr)
def test_maps_and_bases(value):
    refused(lambda: KnotMap(-torch.ones(3), torch.ones(3), value), "density")
    refused(lambda: KnotMap(value, torch.ones(3), torch.ones(3, 3)), "low")
    refused(lambda: bspline_basis(value, -1.0, 1.0, 5, 3), "`x`")
    if not isinstance(value, int):
        refused(lambda: TanhBound(value), "in_features")
    refused(lambda: TanhBound(3, "low"), "low")


##########################
# Functions              #
##########################

BASE, TUNED = KAN([3, 4, 2]), KAN([3, 4, 2])
NO_NUMBER = [None, "x", [], {}, (1, 2), math.nan]


@pytest.mark.parametrize("value", NO_NUMBER[1:], ids=repr)
def test_amounts(value):
    for name in ("energy", "budget"):
        refused(lambda name=name: slim(BASE, **{name: value}), name)
        refused(lambda name=name: extract_lotra(copy.deepcopy(BASE), TUNED, **{name: value}), name)
    refused(lambda: KAN([3, 2]).update_grid(X, value), "margin")


def test_a_budget_beyond_all_integers():
    assert isinstance(slim(KAN([6, 8, 4]), budget=10**30).layers[0], KANLinear)


@pytest.mark.parametrize("value", NO_NUMBER, ids=repr)
@pytest.mark.parametrize("name", ["damping", "floor", "forgetting", "memory", "max_damping"])
def test_numbers_of_levenberg_marquardt(name, value):
    refused(lambda: LevenbergMarquardt(BASE, **{name: value}), name)


@pytest.mark.parametrize("steps", [-1, 2.5, "x", None, True], ids=repr)
def test_steps_of_levenberg_marquardt(steps):
    refused(lambda: LevenbergMarquardt(BASE).fit([(residual, X)], steps, progress=False), "`steps` is")


@pytest.mark.parametrize("value", ["x", None, math.nan, [1]], ids=repr)
@pytest.mark.parametrize("name", ["target_loss", "tolerance", "patience", "max_seconds", "callback", "held", "terms"])
def test_arguments_of_a_fit(name, value):
    """They were found out after a step, which the model kept."""
    if name in ("callback", "held") and value is None:
        return
    model = copy.deepcopy(BASE)
    arguments = {"terms": [(residual, X)], "steps": 3, "progress": False, name: value}
    refused(lambda: LevenbergMarquardt(model).fit(**arguments), "term" if name in ("held", "terms") else name)
    if name == "terms":
        refused(lambda: LevenbergMarquardt(model).fit(lambda number: value, 3, progress=False), "term")
    assert all(map(torch.equal, model.parameters(), BASE.parameters()))


@pytest.mark.parametrize("value", [None, 1, "yes", torch.tensor(True)], ids=repr)
def test_switches_of_levenberg_marquardt(value):
    refused(lambda: LevenbergMarquardt(BASE, geodesic=value), "geodesic")


def residual(model, x):
    return model(x) - 1


@pytest.mark.parametrize(
    "terms", [None, 3, residual, "x", {}, [(residual, None)], [(residual, X, "x")], [(residual, X, X)]], ids=range(8)
)
def test_terms(terms):
    refused(lambda: LevenbergMarquardt(BASE).step(terms), "term")


def test_models_that_levenberg_marquardt_cannot_train():
    for model in (nn.Linear(2, 1, dtype=torch.cfloat), KAN([2, 1], device="meta")):
        refused(lambda model=model: LevenbergMarquardt(model), "parameter")
    refused(lambda: LevenbergMarquardt(BASE).step([(residual, X.to("meta"))]), "with values")


def test_models_that_slim_cannot_read():
    refused(lambda: slim(nn.DataParallel(KAN([6, 8, 4])), 2), r"model\.module")
    refused(lambda: slim(KAN([6, 8, 4], device="meta"), 2), "meta")
    refused(lambda: slim(torch.jit.trace(KAN([6, 8, 4]), torch.rand(2, 6)), 2), "torch.jit")
    for inputs in (torch.rand(9, 3).to("meta"), torch.rand(9, 3).to_sparse()):
        refused(lambda inputs=inputs: slim(BASE, energy=0.9, inputs=inputs), "inputs")


def test_functions():
    model = adapted()
    refused(lambda: create_lotra_optimizer(model, "adam", lr=0.1), "optimizer_cls")
    refused(lambda: save_adapter(model, None), "folder")
    refused(lambda: write_model_card(model, 3), "folder")
