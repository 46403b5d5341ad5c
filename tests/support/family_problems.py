# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A small family with a known solution, whose functions can be sent to other processes."""

import torch

from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


POINTS = torch.linspace(-1, 1, 60, dtype=torch.float64).unsqueeze(1)


def equation(model, x, c, a=1.0):
    """u'' + a c^2 sin(c x) = 0 for u = (1 - x^2) N, which is zero at both ends."""
    n, (slope,), second = jet(model, x, collapse=True)
    return (1 - x**2) * second - 4 * x * slope - 2 * n + a * c**2 * torch.sin(c * x)


def terms_of(c):
    return [(equation, (POINTS, torch.full_like(POINTS, c)))]


def solution(n, x):
    """The solution with u(-1) = u(1) = 0 by the values of the network."""
    return (1 - x**2) * n


def exact(c, x=POINTS):
    return torch.sin(c * x) - x * torch.sin(torch.tensor(c, dtype=torch.float64))


def error(evaluate, c):
    with torch.no_grad():
        return ((solution(evaluate(POINTS), POINTS) - exact(c)).norm() / exact(c).norm()).item()


def pretrained(c=3.0, seed=0):
    torch.manual_seed(seed)
    base = KAN([1, 4, 1], 6, dtype=torch.float64)
    LevenbergMarquardt(base, floor=1e-6).fit(terms_of(c), 25, progress=False)
    return base


def terms_of_two(parameter):
    c, a = parameter
    return [(equation, (POINTS, torch.full_like(POINTS, c), torch.full_like(POINTS, a)))]


def terms_that_fail(c):
    if abs(c - 2.6) < 1e-9:
        raise ZeroDivisionError("no solution here")
    return terms_of(c)


def train_by_adam(model, c):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, c).backward()
        optimizer.step()


def loss_of(model, c):
    return (solution(model(POINTS), POINTS) - exact(c)).square().mean()
