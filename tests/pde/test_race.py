# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
from pde_problems import by_autograd, poisson
from torch import nn

from peft_lotra.pde import BoxDistance, ResidualSampler, budget, marching, race, solve


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few points and narrow networks, a race of few steps, and no polynomials."""
    monkeypatch.setattr(marching, "FIRST_COUNTS", {})
    monkeypatch.setattr(race, "POINTS", 200)
    monkeypatch.setattr(race, "FEWEST_STEPS", 2)
    monkeypatch.setattr("peft_lotra.pde.networks.WIDTHS", (4, 5))
    monkeypatch.setattr("peft_lotra.pde.networks.TANH_WIDTHS", (6, 6))


def solved(residual=poisson, *, high=1.0, distance=None, steps=30, **options):
    distance = distance or BoxDistance([0], [high])
    return solve(residual, [0], [high], distance=distance, steps=steps, progress=False, **options)


def test_networks_race_for_a_tenth_of_the_budget_each_and_the_best_goes_on():
    result = solved()

    starts = [phase for phase in result.phases if phase.name == "start"]
    best = min(starts, key=lambda phase: phase.held)
    assert [(phase.network, phase.steps) for phase in starts] == [("splines", 3), ("tanh", 3)]
    assert result.phases[2].name == "coarse" and result.phases[2].network == best.network
    assert len(result.history) == 30
    assert best.network in str(result)


def test_a_residual_by_autograd_races_as_one_by_jet():
    result = solved(by_autograd, steps=20)
    expected = solved(steps=20)

    assert [phase.network for phase in result.phases] == [phase.network for phase in expected.phases]
    assert result.phases[1].held == pytest.approx(expected.phases[1].held, rel=0.05)


def test_the_winner_has_the_least_residual_of_all_phases():
    result = solved(steps=40)

    assert result.residual**2 <= min(phase.held for phase in result.phases) * 1.001


def test_a_race_is_the_same_each_time():
    assert solved(steps=20).residual == pytest.approx(solved(steps=20).residual, rel=1e-6)


@pytest.mark.parametrize("options", [{"network": nn.Linear(1, 1)}, {"steps": 12}])
def test_a_network_of_the_caller_or_a_small_budget_has_no_race(options, monkeypatch):
    monkeypatch.setattr(race, "FEWEST_STEPS", 8)

    result = solved(**options)

    assert len({phase.network for phase in result.phases}) == 1


def test_a_stall_with_a_large_residual_starts_from_scratch(monkeypatch):
    monkeypatch.setattr(budget, "UNSOLVED_PATIENCE", 1)
    monkeypatch.setattr(budget, "STALLED", 0.0)

    # no solution: u = 0 at both ends, and a residual that no network makes small
    result = solved(lambda model, x: model(x) ** 2 + 1, steps=40)

    starts = [phase for phase in result.phases if phase.name == "start"]
    assert len(starts) > 2
    assert result.phases[2].reason in ("stalled", "refused")
    assert len(result.history) == 40


def test_a_stall_with_a_small_residual_goes_on_with_more_points(monkeypatch):
    counts = set()
    draw = ResidualSampler.draw

    def counted_draw(self, *args):
        counts.add(self.count)
        return draw(self, *args)

    monkeypatch.setattr(budget, "PATIENCE", 1)
    monkeypatch.setattr(budget, "STALLED", 0.0)
    monkeypatch.setattr(ResidualSampler, "draw", counted_draw)

    solved(steps=60)

    assert counts in ({100, 200}, {100, 200, 400})


def test_a_short_budget_names_the_seconds_of_a_full_run(monkeypatch):
    monkeypatch.setattr(race, "FEWEST_STEPS", 10**6)

    result = solved(steps=None, seconds=0.5)

    assert any("A full run takes about" in note for note in result.notes)
