# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_lotra import extract_lotra, slim, suggest_ranks
from peft_lotra.compress.inputs import check_inputs, model_outputs, observed
from peft_lotra.kan import KAN


X = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
T = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


class OfSpaceAndTime(nn.Module):
    """A network of two inputs, whose layers are called by `.forward`, as Convolutional-KANs calls them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = KAN([3, 8]).layers[0], KAN([8, 4]).layers[0]

    def forward(self, x, t, mask=None):
        return self.second.forward(x=self.first.forward(torch.cat([x, t], 1)))


def tuned(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.spline_weight += torch.randn_like(layer.spline_weight) * 0.1
    return model


WAYS = {
    "tuple": (X, T),
    "list": [X, T],
    "dict": {"x": X, "t": T},
    "function": lambda model: model(X, T),
    "batches": lambda model: torch.cat([model(*batch) for batch in zip(X.split(25), T.split(25), strict=True)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_models_of_several_inputs(way):
    base, inputs = OfSpaceAndTime(), WAYS[way]
    fine = tuned(base)
    reference = slim(base, (3, 3, 3), inputs=(X, T)).slim_report
    report = slim(base, (3, 3, 3), inputs=inputs).slim_report
    assert report.model_error == pytest.approx(reference.model_error, rel=1e-4) and 0 < report.model_error < 1
    adapted = extract_lotra(copy.deepcopy(base), fine, (4, 4, 3), inputs=inputs)
    assert adapted.extraction_report.output_errors.keys() == {"first", "second"}
    ranks = suggest_ranks(base, fine, energy=0.9, inputs=inputs)
    assert ranks == suggest_ranks(base, fine, energy=0.9, inputs=(X, T))
    without = suggest_ranks(base, fine, energy=0.9)
    assert ranks.keys() == without.keys() and ranks != without  # what the inputs do not show costs nothing


def test_inputs_of_suggest_ranks_need_two_models():
    with pytest.raises(ValueError, match="Pass either a spectrum, or a base model and a tuned one"):
        suggest_ranks(OfSpaceAndTime(), energy=0.9, inputs=(X, T))
    base = OfSpaceAndTime()
    assert suggest_ranks(base, copy.deepcopy(base), energy=0.9, inputs=(X, T)) == {
        "^first": (1, 1, 1),
        "^second": (1, 1, 1),
    }


@pytest.mark.parametrize(
    "inputs, message",
    [
        ("text", "got a str of 0 tensors without samples"),
        (None, "got a NoneType"),
        ([], "got a list of 0 tensors without samples"),
        (
            (torch.ones(3, 2), torch.ones(3, 1)),
            "got a tuple of 2 tensors with a single sample, or many that are equal",
        ),
        ({"x": X, "t": T / 0}, "got a dict of 2 tensors with NaN or infinite values"),
        (X[:0], r"got a Tensor of shape \(0, 2\) without samples"),
        (X[:1], r"got a Tensor of shape \(1, 2\) with a single sample"),
    ],
)
def test_inputs_that_cannot_be(inputs, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(inputs)


def test_inputs_that_can():
    for inputs in (X, (X, torch.tensor(2.0)), {"ids": torch.arange(6).view(3, 2), "x": [X]}, len):
        check_inputs(inputs)


@pytest.mark.parametrize("result", [None, 3, "text"])
def test_a_function_must_return_the_output(result):
    with pytest.raises(TypeError, match=f"it returned {type(result).__name__}.*a function that runs the model"):
        model_outputs(OfSpaceAndTime(), lambda model: result)


def test_modes_are_kept():
    model = OfSpaceAndTime().train()
    model.second.eval()
    seen = []
    model_outputs(model, lambda m: [seen.append(m.training), m(X, T)][1])
    assert seen == [False] and model.training and model.first.training and not model.second.training


def test_observed_sees_each_call_and_leaves_nothing():
    model, calls = OfSpaceAndTime(), []
    layers = {"first": model.first, "second": model.second}
    own = model.second.forward
    model.second.forward = lambda x: own(x)  # as accelerate's hooks do
    kept = model.second.forward
    with observed(layers, lambda name, x, y: calls.append((name, tuple(x.shape), tuple(y.shape)))):
        y = model(X, T)
    assert calls == [("first", (60, 3), (60, 8)), ("second", (60, 8), (60, 4))]
    assert torch.equal(model(X, T), y) and len(calls) == 2
    assert "forward" not in vars(model.first) and model.second.forward is kept
    with pytest.raises(ZeroDivisionError), observed(layers, lambda name, x, y: 1 / 0):
        model(X, T)
    assert "forward" not in vars(model.first)
