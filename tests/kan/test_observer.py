# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading

import pytest
import torch

from peft_lotra.derivatives.layers import evaluate_layer
from peft_lotra.kan import KAN, jet
from peft_lotra.kan.observer import current_observer, observing


class Doubling:
    """Answers twice the value of a network, and lets jets pass by an evaluation of its own; counts the layers."""

    def __init__(self) -> None:
        self.layers = 0

    def value(self, network, x):
        return None if x.shape[0] == 1 else torch.full((len(x), 1), 2.0)

    def jet(self, through, x, directions, weights):
        def evaluate(*args):
            self.layers += 1
            return evaluate_layer(*args)

        return through(evaluate, x, directions, weights)


def test_a_network_returns_what_the_observer_answers():
    model, x = KAN([2, 3, 1]), torch.rand(4, 2)
    usual = model(x)
    with observing(Doubling()):
        assert torch.equal(model(x), torch.full((4, 1), 2.0))
        assert torch.equal(model(x[:1]), model.layers[1](model.layers[0](x[:1])))  # no answer
    assert torch.equal(model(x), usual)


def test_a_jet_goes_through_the_observer():
    model, x = KAN([2, 3, 1]), torch.rand(4, 2)
    usual = jet(model, x)
    with observing(Doubling()) as observer:
        seen = jet(model, x)
    assert observer.layers == 2
    for a, e in zip(seen, usual, strict=True):
        assert torch.equal(a, e)


def test_observers_are_of_one_thread_and_one_use():
    outer, inner, others = Doubling(), Doubling(), []
    with observing(outer):
        with pytest.raises(RuntimeError), observing(inner):
            assert current_observer() is inner
            thread = threading.Thread(target=lambda: others.append(current_observer()))
            thread.start()
            thread.join()
            raise RuntimeError
        assert current_observer() is outer
    assert current_observer() is None and others == [None]


def test_compiled_graphs_have_no_observer():
    model, x = KAN([2, 3, 1]), torch.rand(4, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    usual = model(x)
    with observing(Doubling()):
        torch.testing.assert_close(compiled(x), usual)
