# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Registered kinds of layers, and descriptions that are refused."""

import re

import pytest
import torch
from helpers import refused
from orders import Layer
from peft import get_peft_model
from stand_ins import ChebyKANLayer, as_model
from torch import nn

from peft_lotra import KANLayerSpec, LoTRAConfig, find_kan_layers, register_kan_layer
from peft_lotra.kan import KANLinear
from peft_lotra.layers.kinds import REGISTERED
from peft_lotra.layers.recognize import get_kan_spec


class MyKANLayer(Layer):
    def __init__(self, i, o):
        super().__init__(i, o, 4, "i o k", residual="oi")


class Derived(MyKANLayer):
    pass


def register_mine(**changes):
    description = {"matches": MyKANLayer, "coefficients": ("A", "i o k"), "residual": ("base", "o i")}
    return register_kan_layer("my-kan", **{**description, **changes})


@pytest.mark.parametrize("matches", [MyKANLayer, lambda m: hasattr(m, "A"), lambda m: m.A.ndim == 3])
def test_a_class_or_a_predicate_matches_layers(matches, no_inference):
    model = nn.Sequential(MyKANLayer(3, 5), nn.Linear(5, 5), Derived(5, 2))
    assert find_kan_layers(model) == []

    spec = register_mine(matches=matches)

    assert isinstance(spec, KANLayerSpec)
    assert spec.kind == [*REGISTERED][-1] == "my-kan"
    rows = [(row.name, row.kind, row.shape, row.has_residual) for row in find_kan_layers(model)]
    assert rows == [("0", "my-kan", (5, 3, 4), True), ("2", "my-kan", (2, 5, 4), True)]


BASIS = {
    "basis": lambda m, x: x[..., None] ** torch.arange(4),
    "activation": lambda m, x: nn.functional.silu(x),
}


@pytest.mark.parametrize(
    "changes, runs_by",
    [
        ({}, "forward"),
        (BASIS, "formula"),
        ({**BASIS, "activation": None}, "forward"),
        ({**BASIS, "activation": lambda m, x: 2 * x}, "forward"),
    ],
)
def test_a_layer_runs_by_a_formula_that_gives_its_outputs(changes, runs_by):
    register_mine(**changes)

    (row,) = find_kan_layers(MyKANLayer(3, 5))

    assert row.runs_by == runs_by


CHEBY = {"matches": ChebyKANLayer, "coefficients": ("cheby_coeffs", "i o k")}


def test_the_last_registered_kind_is_asked_first_and_a_name_is_replaced():
    layer = ChebyKANLayer(3, 4, degree=2)

    for name in ("mine", "mine-too", "mine"):
        register_kan_layer(name, **CHEBY)

        assert get_kan_spec(layer).kind == name
        assert [*REGISTERED].count(name) == 1


def test_a_kind_that_loses_its_class_warns(recwarn):
    """A registration that was copied would otherwise take the description of the first class away, in silence."""
    register_mine()
    again = type("MyKANLayer", (Layer,), {})  # as a notebook defines it when its cell runs again
    register_mine(matches=again)
    register_mine(matches=lambda m: hasattr(m, "A"))
    register_mine(residual=None)

    assert not recwarn
    with pytest.warns(UserWarning, match="described MyKANLayer, and from now on describes ChebyKANLayer alone"):
        register_mine(matches=ChebyKANLayer)


def test_the_name_of_a_built_in_kind_is_refused():
    with refused("'cheby-kan' is a built-in kind.* Choose another name"):
        register_kan_layer("cheby-kan", **CHEBY)


class Phases(nn.Module):
    """Sines with a constant phase for each input and frequency."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 5))
        self.phase = nn.Parameter(torch.rand(3, 5), requires_grad=False)

    def forward(self, x):
        angle = x.unsqueeze(-1) * torch.arange(1, 6) + self.phase
        return torch.einsum("bik,oik->bo", torch.sin(angle), self.weight)


def test_a_constant_of_a_registered_layer_is_left_out_without_a_word(recwarn):
    register_kan_layer("phases", matches=Phases, coefficients=("weight", "o i k"))
    network = nn.Sequential(Phases())

    layers = find_kan_layers(network, torch.rand(5, 3))
    get_peft_model(network, LoTRAConfig(r=2))

    assert "leaves out" not in str(layers)
    assert len(recwarn) == 0


def test_a_single_name_may_be_a_string():
    register_kan_layer("phases", matches=Phases, coefficients=("weight", "o i k"), grid="phase")

    model = get_peft_model(nn.Sequential(Phases()), LoTRAConfig(r=2))

    with torch.no_grad():
        model.base_model.model[0].phase.add_(1)
    with pytest.raises(RuntimeError, match="grid"):
        model(torch.rand(5, 3))


@pytest.mark.parametrize("changes", [{"grid": ("typo",)}, {"grid": ("A", "of.*.typo")}, {"grid_methods": ("typo",)}])
def test_names_that_the_layer_does_not_have_are_refused(changes):
    register_mine(**changes)

    with refused("of 'my-kan' names '.*typo', and MyKANLayer has no such attribute"):
        find_kan_layers(as_model(MyKANLayer(3, 5)))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"coefficients": []}, "Expected a name and its pattern"),
        ({"coefficients": "A"}, "Expected a name and its pattern"),
        ({"coefficients": [("a", "o i k"), ("a", "o i")]}, "with each name once"),
        ({"matches": "MyKANLayer"}, "Give a class, or a predicate"),
        ({"basys": None}, "unexpected keyword argument 'basys'"),
    ],
)
def test_wrong_descriptions_are_refused(changes, problem):
    kinds = [*REGISTERED]

    with pytest.raises((TypeError, ValueError), match=problem):
        register_mine(**changes)

    assert [*REGISTERED] == kinds


@pytest.mark.parametrize(
    "pattern, problem",
    [
        ("o k", "`o` and `i` must appear once each"),
        ("o i k k", 'duplicate dimension "k"'),
        ("o (i k", "Imbalanced parentheses"),
        ("o i k-1", "Unknown character '-'"),
        ("o ... i ...", "duplicate dimension"),
        ("o (i k):0", "Unknown character ':'"),
        ("o (i + i)", "the residual weights, of axes `o` and `i` alone"),
        ("o ((i k) + )", "the residual weights, of axes `o` and `i` alone"),
    ],
)
def test_malformed_patterns_are_refused(pattern, problem):
    with refused(re.escape(repr(pattern))) as error:
        register_mine(coefficients=("A", pattern), residual=None)

    assert problem in str(error.value)


def test_a_tied_layer_is_found_whose_twin_is_in_modules_to_save():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = KANLinear(3, 3), KANLinear(3, 2)
            self.second = self.first

        def forward(self, x):
            return self.last(self.second(self.first(x)))

    model = get_peft_model(Tied(), LoTRAConfig(target_modules=["last"], modules_to_save=["first"]))

    assert {layer.name.rpartition(".")[2] for layer in find_kan_layers(model)} == {"second", "last"}
