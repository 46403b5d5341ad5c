# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Kinds of layers that are registered: which layers they match, and what is refused."""

from __future__ import annotations

import re

import pytest
from helpers import adapt, inputs, relative
from orders import Layer
from stand_ins import ChebyKANLayer, as_model
from torch import nn

from peft_lotra import KANLayerSpec, find_kan_layers, register_kan_layer
from peft_lotra.layers.registry import get_kan_spec, known_kinds


class MyKANLayer(Layer):
    def __init__(self, i, o):
        super().__init__(i, o, 4, "i o k", residual="oi")


class Derived(MyKANLayer):
    pass


def register_mine(**changes):
    description = {"matches": MyKANLayer, "coefficients": ("A", "i o k"), "residual": ("base", "o i")}
    return register_kan_layer("my-kan", **{**description, **changes})


@pytest.mark.parametrize("matches", [MyKANLayer, lambda m: hasattr(m, "A"), lambda m: m.A.ndim == 3])
def test_classes_and_predicates(matches, no_inference):
    model = nn.Sequential(MyKANLayer(3, 5), nn.Linear(5, 5), Derived(5, 2))
    assert find_kan_layers(model) == []
    spec = register_mine(matches=matches)
    assert isinstance(spec, KANLayerSpec) and spec.family == "my-kan" == known_kinds()[-1]
    found = [(layer.name, layer.family, layer.shape, layer.has_residual) for layer in find_kan_layers(model)]
    assert found == [("0", "my-kan", (5, 3, 4), True), ("2", "my-kan", (2, 5, 4), True)]

    before = model(x := inputs())
    y = (adapted := adapt(model))(x)
    assert relative(y, before) > 1e-2 and relative(adapted.merge_and_unload()(x), y) < 1e-5


def test_the_last_registered_is_asked_first():
    layer, same = ChebyKANLayer(3, 4, degree=2), {"matches": ChebyKANLayer, "coefficients": ("cheby_coeffs", "i o k")}
    register_kan_layer("picky", matches=lambda m: m.no_such_attribute > 3, coefficients=("weight", "o i k"))
    assert get_kan_spec(layer).family == "cheby-kan"
    for name in ("mine", "mine-too", "mine"):  # a user's name is replaced, and is the last one then
        register_kan_layer(name, **same)
        assert get_kan_spec(layer).family == name and known_kinds().count(name) == 1
    with pytest.raises(ValueError, match="'cheby-kan' is a built-in kind.* Choose another name"):
        register_kan_layer("cheby-kan", **same)
    cls = type("Carrier", (ChebyKANLayer,), {"kan_spec": KANLayerSpec("own", nn.Module, ("cheby_coeffs", "i o k"))})
    assert get_kan_spec(cls(3, 4, degree=2)).family == "own" and "own" not in known_kinds()


@pytest.mark.parametrize("changes", [{"grid": ("typo",)}, {"grid": ("A", "of.*.typo")}, {"grid_methods": ("typo",)}])
def test_names_that_the_layer_does_not_have(changes):
    register_mine(**changes)
    with pytest.raises(ValueError, match="of 'my-kan' names '.*typo', and MyKANLayer has no such attribute"):
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
def test_bad_descriptions(changes, problem):
    before = known_kinds()
    with pytest.raises((TypeError, ValueError), match=problem):
        register_mine(**changes)
    assert known_kinds() == before


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
def test_malformed_patterns(pattern, problem):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))) as error:
        register_mine(coefficients=("A", pattern), residual=None)
    assert problem in str(error.value)
