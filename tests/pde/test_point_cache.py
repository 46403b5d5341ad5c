# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Distances and lifts are evaluated once for the points of a step, and again when a parameter changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from jet_helpers import assert_same, nested
from pde_problems import line, poisson
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.kan.basis import in_transform
from peft_lotra.pde import BoxDistance, solve


class Recorded(nn.Module):
    """A lift that counts its calls by the points, by whether they are differentiated, and by a value."""

    def __init__(self, function, read=lambda: None) -> None:
        super().__init__()
        self.function, self.read = function, read
        self.calls: Counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        if not in_transform():  # tensors have no numbers there
            self.calls[x.sum().item(), x.requires_grad, self.read()] += 1
        return self.function(x)


def calls_by_step(lift: Recorded, network: nn.Module | None = None) -> list[Counter]:
    """Return the calls in each step but the first, which tries the residual."""
    torch.manual_seed(0)
    network = network or KAN([1, 5, 1], 6, 4, norm="tanh")
    steps = []

    def callback(solution, record) -> None:
        steps.append(lift.calls.copy())
        lift.calls.clear()

    options = {"distance": line, "lift": lift, "network": network}
    solve(poisson, [0.0], [10.0], **options, steps=4, callback=callback, progress=False)
    return steps[1:]


def test_a_lift_is_differentiated_once_for_the_points_of_a_step():
    for calls in calls_by_step(Recorded(torch.sin)):
        counts = [count for (_, differentiates, _), count in calls.items() if differentiates]
        assert max(counts) <= 2  # slopes for the weights, and the jet of the residual


def test_points_that_are_held_out_are_evaluated_in_each_step():
    """A callback may change what a lift reads."""
    first, *later = calls_by_step(Recorded(torch.sin))

    assert set(first).intersection(*later)


def most_values(calls: Counter) -> int:
    """Return the largest number of values that were read at the same points."""
    counts = Counter(points for points, differentiates, _ in calls if differentiates)
    return max(counts.values())


def test_the_parameters_of_a_lift_are_trained_and_never_stale():
    class Bend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.size * torch.sin(x)

    bend = Bend()

    for calls in calls_by_step(Recorded(bend, lambda: bend.size.item())):
        assert most_values(calls) > 1  # at the points of the step, before and after it


def test_a_lift_that_reads_the_network_is_never_stale():
    network = KAN([1, 5, 1], 6, 4, norm="tanh")
    middle = torch.tensor([[0.5]], dtype=torch.float64)
    lift = Recorded(lambda x: line(x) * network(middle).detach(), lambda: network(middle).item())

    for calls in calls_by_step(lift, network):
        assert most_values(calls) > 1


BOX = (-1.0, 0.0), (1.0, 2.0)


@pytest.mark.parametrize("weights", [None, (0.5, -2.0, 1.0)])
@pytest.mark.parametrize("sides", [None, [(0, "low"), (1, "low"), (1, "high")], []])
def test_the_distance_of_a_box_has_closed_derivatives(sides, weights):
    twice = [] if sides == [] else [(1, "low")]
    distance = BoxDistance(*BOX, sides, twice).double()
    x = torch.lerp(distance.low, distance.high, torch.rand(12, 2, dtype=torch.float64))
    directions = torch.randn(3, 2, dtype=torch.float64)

    derivatives = jet(distance, x, directions, order=4, collapse=False if weights is None else weights)

    expected = list(nested(distance, x, directions, order=4))
    if weights is not None:
        expected[-1] = torch.tensordot(torch.tensor(weights, dtype=torch.float64), expected[-1], 1)
    assert_same(derivatives, expected)
