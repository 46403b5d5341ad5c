# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`slim` of models that are used in other ways than most."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import base as model_of_family
from hostile import CLEAR, X
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import slim, to_dense
from peft_lotra.kan import KAN


class Two(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.kan = nn.Sequential(*layers)

    def forward(self, x):
        return self.kan(x)


def plain():
    torch.manual_seed(11)
    return Two(KAN([3, 8, 8]), KAN([8, 8]))


def foreign():
    torch.manual_seed(11)
    return model_of_family("efficient-kan-old", in_features=8, out_features=8)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first = KAN([6, 6])
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


# once: the name that `find_kan_layers` gives is replaced, the other one keeps the dense layer
def test_a_layer_used_twice():
    model = Twice()
    model.second = nn.ModuleList([model.first.layers[0]])
    model.first = nn.ModuleList([model.first.layers[0]])
    small = slim(model, ranks=1)
    assert small.first[0] is small.second[0]
    assert sum(p.numel() for p in small.parameters()) == small.slim_report.parameters[1]
    assert sum(p.numel() for p in model.parameters()) == small.slim_report.parameters[0]


# once: the Slim layer is a new module, without the hooks of the old one
@pytest.mark.parametrize("make", [plain, foreign])
def test_hooks_are_kept(make):
    model, calls = make(), []
    layer = next(m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    layer.register_forward_hook(Count(calls))
    layer.register_forward_pre_hook(Count(calls))
    try:
        small = slim(model, ranks=2)
    except ValueError as error:
        assert "hook" in str(error)
        return
    with torch.no_grad():
        small(X if make is plain else torch.rand(4, 8))
    assert Count.calls == 2


class Count:
    """A hook that survives a deep copy."""

    calls = 0

    def __init__(self, _):
        type(self).calls = 0

    def __call__(self, *args):
        type(self).calls += 1


# once: `SlimKANLinear.from_components` made parameters that require a gradient
@pytest.mark.parametrize("make", [plain, foreign])
def test_frozen_layers_stay_frozen(make):
    model = make().requires_grad_(False)
    small = slim(model, ranks=2)
    assert [name for name, parameter in small.named_parameters() if parameter.requires_grad] == []
    assert [name for name, parameter in small.to_dense().named_parameters() if parameter.requires_grad] == []


# once: `tucker.tucker` calls tensorly without a random_state, which then draws from np.random on small tensors
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_no_global_generator_is_drawn_from(energy, inputs):
    torch.manual_seed(0)
    model, x = KAN([2, 3, 1]), torch.rand(20, 2) * 1.8 - 0.9
    np.random.seed(0)
    before, before_torch = np.random.get_state(), torch.get_rng_state()
    first = slim(model, energy=energy, inputs=x if inputs else None)
    after = np.random.get_state()
    assert np.array_equal(before[1], after[1]) and before[2] == after[2]
    assert torch.equal(before_torch, torch.get_rng_state())
    np.random.seed(1)
    second = slim(model, energy=energy, inputs=x if inputs else None)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# once: 7 of 25 keep less: ranks are chosen by the spectrum of single modes, whose shares add up to more than is lost
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("inputs", [False, True])
def test_the_energy_that_was_promised(seed, inputs):
    missed = []
    for energy in (0.5, 0.8, 0.9, 0.99, 0.999):
        torch.manual_seed(seed)
        model = KAN([2, 3, 1])
        x = torch.rand(50, 2) * 1.8 - 0.9
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = slim(model, energy=energy, inputs=x if inputs else None)
        with torch.no_grad():
            y, z = model(x).double(), small(x).double()
        if inputs:
            kept = 1 - ((z - y).square().sum() / (y - y.mean(0)).square().sum()).item()
        else:
            kept = 1 - max((error**2 for error in small.slim_report.errors.values()), default=0.0)
        if kept < energy - 1e-6:
            missed.append((energy, kept))
    assert not missed, missed


INPUTS = {
    "NaN": torch.full((20, 3), float("nan")),
    "one NaN": torch.cat([torch.rand(19, 3), torch.full((1, 3), float("nan"))]),
    "infinite": torch.full((20, 3), float("inf")),
    "empty": torch.rand(0, 3),
    "single": torch.rand(1, 3),
    "one dimension": torch.rand(3),
    "constant": torch.full((20, 3), 0.3),
    "two that are equal": torch.full((2, 3), 0.3),
    "a list": [[0.1, 0.2, 0.3]],
}


# once: LinAlgError, ZeroDivisionError or IndexError from deep inside; a single or a constant input gives NaN
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("amount", [{"ranks": 2}, {"energy": 0.9}, {"budget": 300}])
def test_inputs_that_say_nothing(kind, amount):
    model = plain()
    try:
        small = slim(model, inputs=INPUTS[kind], **amount)
    except Exception as error:
        assert isinstance(error, (*CLEAR, TypeError)) and "inputs" in str(error), repr(error)
        return
    with torch.no_grad():
        assert small(X).isfinite().all()
    error = small.slim_report.model_error
    assert error is None or error == error, "the error is NaN"


# once: a budget below that of ranks 1 was asked for
@pytest.mark.parametrize("inputs", [False, True])
def test_a_layer_too_small_for_factors(inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = slim(KAN([1, 1]), energy=0.9, inputs=torch.rand(20, 1) if inputs else None)
    assert small.slim_report.dense == ["layers.0"] and small.slim_report.parameters == (9, 9)


# once: LinAlgError, since no feature reaches the second layer
@pytest.mark.parametrize("amount", [{"ranks": 2}, {"energy": 0.9}, {"budget": 300}])
def test_a_model_that_is_zero(amount):
    model = plain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        small = slim(model, inputs=torch.rand(20, 3), **amount)
        assert not small(X).any()


def test_a_model_that_returns_one_number_for_each_sample():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.kan = KAN([3, 8, 8])

        def forward(self, x):
            return self.kan(x).sum(-1)

    small = slim(Squeezed(), energy=0.9, inputs=torch.rand(50, 3))
    assert small.slim_report.model_error**2 <= 0.1


# once: a full backward hook was copied, and did not run
@pytest.mark.parametrize("make", [plain, foreign])
def test_backward_hooks_are_kept(make):
    model = make()
    layer = next(m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    layer.register_full_backward_hook(Count([]))
    small = slim(model, ranks=2)
    for kan, calls in ((small, 1), (small.to_dense(), 2)):
        kan((X if make is plain else torch.rand(4, 8)).requires_grad_()).sum().backward()
        assert Count.calls == calls


# once: the dense equivalent was free again
@pytest.mark.parametrize("make", [plain, foreign])
def test_layers_frozen_since_stay_frozen(make):
    small = slim(make(), ranks=2)
    assert all(parameter.requires_grad for parameter in small.to_dense().parameters())
    dense = small.requires_grad_(False).to_dense()
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    assert all(parameter.requires_grad for parameter in small.requires_grad_(True).to_dense().parameters())


@pytest.mark.parametrize("family", ["own", "efficient-kan"])
def test_dense_layers_made_in_inference_mode_are_trained(family):
    small = slim(nn.Sequential(FAMILIES[family](8, 8), nn.Linear(8, 2)), 2)
    with torch.inference_mode():
        dense, layer = to_dense(small), small[0].to_dense()
    dense(torch.rand(3, 8)).sum().backward()
    layer(torch.rand(3, 8)).sum().backward()
