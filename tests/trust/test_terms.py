# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Residual terms that LevenbergMarquardt refuses: the message names the term."""

from __future__ import annotations

import copy

import pytest
import torch
from hostile import adapted, outcome, time_limit
from torch import nn

from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt


ROWS = torch.linspace(-0.9, 0.9, 200, dtype=torch.float64).unsqueeze(1)


def small():
    torch.manual_seed(0)
    return KAN([1, 4, 1]).double()


def refused_term(term, model, *words, rows=ROWS):
    before = copy.deepcopy(model.state_dict())
    with time_limit(5), pytest.raises(ValueError) as caught:
        LevenbergMarquardt(model).step([(term, (rows, rows.sin()))])
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def centered(model, x, y):
    u = model(x)
    return u - u.mean(0) - y


def far(model, x, y):
    """Coupled in many rows only, which a few rows do not tell."""
    return model(x) - model(x)[-1:] * (len(x) > 100)


def neighbors(model, x, y):
    return model(x) - model(x).roll(1, 0) - y


# once: `_towards_chains` finds that rows depend on others, returns None, and the Jacobian is then taken row by row,
# where the mean of one row is the row itself: wrong numbers, and the loss falls or not
@pytest.mark.parametrize("term", [centered, neighbors, far])
def test_residuals_that_depend_on_other_rows(term):
    refused_term(term, small(), term.__name__, "row")


def doubles_its_rows(model, x, y):
    x *= 2
    return model(x) - y


def assigns_a_part(model, x, y):
    y[y > 0] = 0
    return model(x) - y


def shrinks_a_parameter(model, x, y):
    with torch.no_grad():
        model.layers[0].base_weight.mul_(0.9)
    return model(x) - y


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("term", [doubles_its_rows, assigns_a_part, shrinks_a_parameter])
def test_terms_that_write_into_what_they_are_given(term, inference):
    rows, model = ROWS.clone(), small()
    with torch.inference_mode(inference):
        refused_term(term, model, term.__name__, "writes into", rows=rows)
    assert torch.equal(rows, ROWS)


def test_a_term_that_writes_into_a_candidate():
    """Not when it is first seen, but where a step is tried."""
    calls = []

    def late(model, x, y):
        calls.append(len(x))
        if calls.count(len(ROWS)) == 3:  # after the residuals and the Jacobian
            return shrinks_a_parameter(model, x, y)
        return model(x) - y

    refused_term(late, small(), "late", "writes into")


def fits(model, x, y):
    return model(x) - y


def bends(model, x, y):
    return jet(model, x)[2][0] + y


@pytest.mark.parametrize("term", [fits, bends])
@pytest.mark.parametrize(
    "model",
    [
        small,
        lambda: adapted(KAN([1, 4, 1])),
        lambda: nn.Sequential(KAN([1, 4, 1]), nn.Linear(1, 1), nn.Softplus()),
    ],
    ids=["kan", "adapted", "any"],
)
def test_rows_and_steps_under_inference_mode(model, term):
    model = model()
    with torch.inference_mode():
        terms = [(term, (ROWS.clone(), ROWS.sin()))]
        assert LevenbergMarquardt(model).step(terms).accepted
        assert len(LevenbergMarquardt(model).fit(terms, 2, held=terms, progress=False)) == 2
    assert LevenbergMarquardt(model).step(terms).accepted
    model(ROWS.to(next(model.parameters()))).sum().backward()


def test_models_made_under_inference_mode():
    with torch.inference_mode():
        model = small()
    with pytest.raises(ValueError, match="`layers.0.*inference_mode.*make the model outside"):
        LevenbergMarquardt(model)
    inner = KAN([1, 4, 1])
    refused_term(centered, nn.Sequential(model.requires_grad_(False), inner), "centered", "row")
    assert LevenbergMarquardt(nn.Sequential(model, inner)).step([(fits, (ROWS, ROWS.sin()))]).accepted


def test_a_term_that_writes_into_its_own_tensors(recwarn):
    def residual(model, x, y):
        x = x * 2
        x *= 0.5
        return model(x).sub_(y)

    assert LevenbergMarquardt(small()).step([(residual, (ROWS, ROWS.sin()))]).accepted and not recwarn


class Batch(nn.Module):
    """Not a KAN of this package alone, so that no records tell."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)
        ).double()

    def forward(self, x):
        return self.net(x)


def plain(model, x, y):
    return model(x) - y


# once: the same without a check at all
def test_residuals_that_depend_on_other_rows_in_any_model():
    refused_term(centered, nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double(), "centered", "row")


# once: raises from deep within torch, of one row that has no variance
def test_batch_normalization():
    refused_term(plain, Batch(), "plain", "row")


def broadcast(model, x, y):
    return model(x).squeeze(1) - y


# once: `_call` takes any shape with n rows: 200 residuals in each of 200 rows, whose number grows with n^2
def test_residuals_by_broadcasting():
    refused_term(broadcast, small(), "broadcast", "(200, 200)", "(200,")


# passes already where it must: n residuals in each of n rows may be meant
def test_as_many_residuals_as_rows():
    def square(model, x, y):
        return (model(x) - y).expand(-1, 5)

    assert LevenbergMarquardt(small()).step([(square, (ROWS[:5], ROWS[:5].sin()))]).accepted


# once: the residuals, their Jacobian and those that decide are drawn with different dropout
@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout"])
def test_dropout_of_an_adapter(dropout):
    model = adapted(nn.Sequential(small()), **{dropout: 0.5}).train()
    refused_term(plain, model, "plain", "dropout")
    assert LevenbergMarquardt(model.eval()).step([(plain, (ROWS, ROWS.sin()))]).loss > 0


# once: the same
def test_dropout_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double().train()
    refused_term(plain, model, "plain", "random")


def noisy(model, x, y):
    return model(x) - y + torch.randn_like(y)


# once: the same
def test_a_term_that_draws():
    refused_term(noisy, small(), "noisy", "random")


X = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).unsqueeze(1)


def as_tuple(model, x):
    return model(x), x


def as_scalar(model, x):
    return model(x).square().mean()


def as_float32(model, x):
    return model(x).float()


def as_complex(model, x):
    return torch.complex(model(x), x)


def as_none(model, x):
    return None


def as_number(model, x):
    return 1.0


def as_integers(model, x):
    return torch.ones(len(x), dtype=torch.int64)


def as_other_rows(model, x):
    return model(x)[:-1]


def as_empty(model, x):
    return model(x)[:, :0]


# once: AttributeError, RuntimeError of reshape, of linear algebra or of autograd, without the name of the term
@pytest.mark.parametrize(
    "term",
    [as_tuple, as_scalar, as_float32, as_complex, as_none, as_number, as_integers, as_other_rows, as_empty],
)
@pytest.mark.parametrize("kind", ["kan", "any"])
def test_what_a_term_returns(term, kind):
    torch.manual_seed(0)
    model = KAN([1, 3, 1]) if kind == "kan" else nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    model = model.double()
    before = [parameter.clone() for parameter in model.parameters()]
    error, _ = outcome(lambda: LevenbergMarquardt(model).step([(term, (X,))]))
    if term is as_float32:
        assert error is None  # float32 is as good as cast up
        return
    assert isinstance(error, (ValueError, TypeError)), repr(error)
    assert term.__name__ in str(error), error
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


# once: RuntimeError of index_add, or of a matrix product, on dtypes
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("collapse", [False, True])
def test_jet_with_directions_that_are_not_real(dtype, collapse):
    model, x = KAN([2, 3, 1]), torch.rand(4, 2)
    with pytest.raises((ValueError, TypeError), match="directions"):
        jet(model, x, torch.ones(2, 2).to(dtype), collapse=collapse)
