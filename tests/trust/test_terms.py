# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Residual terms that LevenbergMarquardt refuses: the message names the term."""

import pytest
import torch
from helpers import refused
from torch import nn

from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt


ROWS = torch.linspace(-0.9, 0.9, 200, dtype=torch.float64).unsqueeze(1)


def small():
    return KAN([1, 4, 1]).double()


def other(*between):
    return nn.Sequential(nn.Linear(1, 4), *between, nn.Linear(4, 1)).double()


def plain(model, x, y):
    return model(x) - y


def centered(model, x, y):
    u = model(x)
    return u - u.mean(0) - y


def neighbors(model, x, y):
    return model(x) - model(x).roll(1, 0) - y


def broadcast(model, x, y):
    return model(x).squeeze(1) - y


def noisy(model, x, y):
    return model(x) - y + torch.randn_like(y)


TERMS = {
    "other rows": (centered, small, "row"),
    "neighbors": (neighbors, small, "row"),
    "other rows in any model": (centered, lambda: other(nn.Tanh()), "row"),
    "broadcasting": (broadcast, small, "squeeze"),
    "a term that draws": (noisy, small, "random"),
    "dropout": (plain, lambda: nn.Sequential(small(), nn.Dropout()), "dropout"),
    "a tuple": (lambda model, x, y: (model(x), x), small, ""),
    "a scalar": (lambda model, x, y: model(x).square().mean(), small, ""),
    "integers": (lambda model, x, y: torch.ones(len(x), dtype=torch.int64), small, ""),
    "fewer rows": (lambda model, x, y: model(x)[:-1], small, ""),
    "nothing": (lambda model, x, y: model(x)[:, :0], lambda: other(nn.Tanh()), ""),
}


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_that_is_not_by_rows_is_refused(kind):
    term, make, word = TERMS[kind]
    model = make()

    with refused(word, model, error=(ValueError, TypeError)) as caught:
        LevenbergMarquardt(model).step([(term, (ROWS, ROWS.sin()))])
    assert term.__name__ in str(caught.value)


def test_terms_of_any_precision_are_taken():
    for term in (plain, lambda model, x, y: model(x).float() - y.float()):
        assert LevenbergMarquardt(small()).step([(term, (ROWS, ROWS.sin()))]).accepted
