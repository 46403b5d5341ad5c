# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which reading of a description is chosen, and that it is chosen once for all layers of a kind."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapt, inputs
from orders import Layer, OtherCheby
from peft import PeftModel, get_peft_model
from stand_ins import as_model
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, register_kan_layer
from peft_lotra.layers.readings import pattern_variants
from peft_lotra.layers.registry import get_kan_spec


def test_layers_of_one_kind_are_run_once():
    ran = []

    class Counted(OtherCheby):
        def forward(self, x):
            ran.append(1)
            return super().forward(x)

    model = nn.Sequential(*[Counted(4, 4) for _ in range(50)])
    find_kan_layers(model)
    once = len(ran)
    assert 0 < once < 10 and len(find_kan_layers(model)) == 50 and len(ran) == once
    for layer in model:  # at attach
        spec = get_kan_spec(layer)
        spec.check("layer", layer, spec.locate(layer))
    assert len(ran) < 20
    once = len(ran)
    find_kan_layers(nn.Sequential(Counted(4, 4), Counted(4, 5)))
    assert len(ran) > once  # another shape is another kind


def test_a_setting_makes_another_kind_of_layer():
    class Either(Layer):
        def __init__(self, transposed):
            super().__init__(4, 4, 5)
            self.transposed = transposed

        def forward(self, x):
            order = "iok" if self.transposed else "oik"
            return torch.einsum(f"bik,{order}->bo", x[..., None] ** torch.arange(5), self.A)

    register_kan_layer("mine", matches=Either, coefficients=("A", "o i k"))
    for transposed, pattern in ((False, "o i k"), (True, "i o k"), (False, "o i k")):
        layer = Either(transposed)
        assert get_kan_spec(layer).locate(layer).parameters["A"].pattern == pattern


def test_an_exchanged_layer_is_reloaded(tmp_path):
    torch.manual_seed(0)
    base = as_model(OtherCheby(4, 4))
    fresh, x = copy.deepcopy(base), inputs(6, in_features=4)
    model = adapt(base)
    y = model(x)
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path)(x), y, atol=1e-6)
    assert LoTRAConfig.from_pretrained(tmp_path).base_layers["kan"]["shape"] == [4, 4, 5]


def test_variants_of_a_pattern():
    assert pattern_variants("o i k") == ["i o k", "k i o", "o k i"]
    assert pattern_variants("g o (k i) ...")[0] == "g i (k o) ..."
    assert pattern_variants("o () (i k):2")[0] == "i () (o k):2"
    assert pattern_variants("o i") == ["i o"]


class Mixed(OtherCheby):
    """What follows the sum mixes inputs, and each position has its own: no reading is verified."""

    def __init__(self):
        super().__init__(4, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return torch.sigmoid(self.mix(super().forward(x)))


@pytest.mark.parametrize("cls", [Mixed, Layer], ids=["no reading is verified", "of no known family"])
def test_a_second_layer_of_a_kind_is_not_run_at_attach(cls):
    ran = []

    class Counted(cls):
        def forward(self, x):
            ran.append(1)
            return super().forward(x)

    def make():
        return nn.Sequential(Counted() if cls is Mixed else Counted(4, 4))

    if cls is Mixed:
        register_kan_layer("mine", matches=Counted, coefficients=("cheby_coeffs", "o i k"), linear=False)
    get_peft_model(make(), LoTRAConfig(r=2))
    once = len(ran)
    get_peft_model(make(), LoTRAConfig(r=2))
    assert 0 < once == len(ran)


class Named(Layer):
    def __init__(self):
        super().__init__(3, 4, 5)
        self.in_features, self.out_features = 3, 4
        self.base, self.phase = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return super().forward(torch.sin(x + self.phase.sum(1))) + x @ self.base.T


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"coefficients": ("A", "k o i")}, ("`A` (4, 3, 5)", "'k o i'", "the layer raised", "'o i k' would fit")),
        (
            {"coefficients": ("A", "o i k"), "residual": ("base", "i o")},
            ("`base`", "'i o'", "(4, 3)"),
        ),
        ({"coefficients": [("A", "o i k"), ("phase", "k i")]}, ("`phase`", "'k i'", "(3, 5)", "i=3, which 5 is not")),
    ],
)
def test_a_pattern_that_does_not_fit_is_named_with_what_would(description, words):
    register_kan_layer("mine", matches=Named, linear=False, **description)
    with pytest.raises(ValueError) as error:
        get_peft_model(nn.Sequential(Named()), LoTRAConfig(r=2))
    assert all(word in str(error.value) for word in words)
