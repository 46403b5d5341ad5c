# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import adapt
from torch import nn

from peft_lotra.kan import KAN, jet
from peft_lotra.kan.observer import current_observer, observing
from peft_lotra.optim.recording import Recorder


def test_recorders_are_of_one_thread_and_one_use():
    parameters = [torch.ones(1, requires_grad=True)]
    with observing(Recorder(parameters, 3)) as outer:
        with pytest.raises(RuntimeError), observing(Recorder(parameters, 4)) as inner:
            assert current_observer() is inner
            raise RuntimeError
        assert current_observer() is outer
    assert current_observer() is None


def network() -> KAN:
    return KAN([2, 5, 1], dtype=torch.float64)


def points() -> torch.Tensor:
    return torch.rand(7, 2, dtype=torch.float64)


def test_a_network_is_recorded_layer_by_layer():
    model, x = adapt(network()), points()
    usual = jet(model, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with observing(Recorder(parameters, 7)) as recorder:
        seen = jet(model, x)
        value = model(x)
    for a, e in zip(seen, usual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert a.is_leaf and a.requires_grad
    torch.testing.assert_close(value, usual[0])
    assert [len(chain.records) for chain in recorder.chains] == [2, 2]
    assert recorder.is_complete(sum(part.sum() for part in seen))


def test_records_keep_the_grid_of_their_time():
    model, x = network(), points()
    with observing(Recorder(model.parameters(), 7)) as recorder:
        jet(model, x)
    before = model.layers[0].grid_bounds.clone()
    model.layers[0].grid_bounds.mul_(2)
    grid = recorder.chains[0].records[0].grid
    assert torch.equal(torch.stack([grid.low, grid.high], -1), before)


@pytest.mark.parametrize("change", ["rows", "gradient", "no_grad", "vector"])
def test_what_is_not_recorded_runs_as_usual(change):
    model, x = network(), points()
    x = {"rows": x[:3], "gradient": x.clone().requires_grad_(), "vector": x[0]}.get(change, x)
    with observing(Recorder(model.parameters(), 7)) as recorder, torch.set_grad_enabled(change != "no_grad"):
        assert torch.equal(model(x), model.layers[1](model.layers[0](x)))
        jet(model, x)
    assert recorder.chains == []


def test_what_the_records_do_not_explain():
    model, x = network(), points()
    other = nn.Parameter(torch.ones((), dtype=torch.float64))
    with observing(Recorder([*model.parameters(), other], 7)) as recorder:
        u = model(x)
    assert recorder.is_complete(u) and not recorder.is_complete(u * other)
    with observing(Recorder([other], 7)) as recorder:  # the layers' coefficients are none of the parameters
        model(x)
    assert recorder.has_gaps
    with observing(Recorder([other], 7)) as recorder:
        assert not recorder.is_complete(other.expand(7, 1))  # no network was evaluated
