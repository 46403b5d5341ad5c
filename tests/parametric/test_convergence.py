# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Members that stop by their held-out residual, are fitted again, or are reported, and solutions by parameter."""

import family_problems as problems
import pytest
import torch
from torch.testing import assert_close

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import HardConstraint


X = problems.POINTS
FEW = X[::5]


def few_terms_of(c):
    """Twelve points, which 80 coordinates fit exactly, while the residual between them stays."""
    return [(problems.equation, (FEW, torch.full_like(FEW, c)))]


def test_a_member_stops_where_its_held_out_residual_does(base):
    family = ParametricAdapter(base, few_terms_of, held_terms_of=problems.terms_of)
    blind = ParametricAdapter(base, few_terms_of, held_terms_of=few_terms_of)

    (member,) = family.fit([2.5], progress=False)
    (blind_member,) = blind.fit([2.5], progress=False)

    assert member.steps < blind_member.steps
    assert member.indicator < member.predicted


def test_a_member_takes_no_more_than_max_steps(base):
    (member,) = ParametricAdapter(base, few_terms_of).fit([2.5], max_steps=2, progress=False)

    assert member.steps == 2


def unsolvable(model, x, c):
    """Add a force beyond 3.05 that no network can balance."""
    return problems.equation(model, x, c) + 1e3 * (c > 3.05) * torch.sin(300 * x)


def test_a_member_far_worse_than_a_neighbor_is_reported(base):
    def terms_of(c):
        return [(unsolvable, (X, torch.full_like(X, c)))]

    family = ParametricAdapter(base, terms_of, ranks=4)

    with pytest.warns(RuntimeWarning, match="3.1: the residual stays at .* times a neighbor's"):
        report = family.fit([2.9, 3.0, 3.1], max_steps=5, progress=False)

    assert list(report.failed) == [3.1]
    assert family.parameters == [2.9, 3.0, 3.1]
    assert report[2].steps <= 4 * 10
    assert "failed: 3.1" in str(report)


@pytest.mark.filterwarnings("error")
def test_members_that_converge_are_silent(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=6)

    report = family.fit([2.6, 2.8, 3.0, 3.2], progress=False)

    assert not report.failed


def solution_of(network, c):
    """Satisfy u(-1) = -c and u(1) = c, with a factor that also depends on c."""
    return HardConstraint(network, lambda x: c * (1 - x**2), lift=lambda x: c * x)


def exact(x, c):
    return torch.sin(3 * x) + (c - torch.sin(torch.tensor(3.0))) * x


def screened(model, x, c):
    """Return the residual of u - u'' = f with the exact solution."""
    u, _, (second,) = jet(model, x)
    return u - second - 9 * torch.sin(3 * x) - exact(x, c)


def terms_of(c):
    return [(screened, (X, torch.full_like(X, c)))]


def test_distance_and_lift_depend_on_the_parameter():
    family = ParametricAdapter(KAN([1, 4, 1], 6, dtype=torch.float64), terms_of, solution_of=solution_of)
    family.fit([0.8, 1.0, 1.2], progress=False)

    prediction = family.predict(1.1)
    refined = family.refine(1.1)

    ends = prediction(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    assert_close(ends, torch.tensor([[-1.1], [1.1]], dtype=torch.float64))
    error = ((refined(X) - exact(X, 1.1)).norm() / exact(X, 1.1).norm()).item()
    assert error < 1e-2
    assert 0.1 < refined.indicator / error < 10
    solution = solution_of(family.as_adapter(1.1), 1.1)
    assert_close(prediction.apply(screened, X, 1.1), screened(solution, X, 1.1))
