# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""pykan at the settings of its notebooks 1 and 7, without their figures, on one thread; it writes into `folder`."""

from __future__ import annotations

import contextlib
import io
import math
import time

import torch
from kan import KAN
from kan.LBFGS import LBFGS
from torch import Tensor

from problems.published import NOTEBOOKS


def notebook_1(seed: int, steps: int, folder: str) -> dict:
    """The least test error of its grids, with the seconds up to there; the best of as many starts as ours."""
    subject = NOTEBOOKS["notebook_1"]
    (x, y), (test_x, test_y) = ([part.float() for part in subject.problem.rows(number)] for number in (seed, 10**6))
    data = {"train_input": x[:900], "train_label": y[:900], "test_input": x[900:], "test_label": y[900:]}
    clock, starts, found = time.process_time(), [], []

    def fit(model: KAN, count: int) -> float:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return float(model.fit(data, opt="LBFGS", steps=count)["test_loss"][-1])

    for start in range(subject.starts):
        model = KAN(width=[2, 1, 1], grid=3, k=3, seed=100 * seed + start, ckpt_path=f"{folder}/{start}")
        starts.append((fit(model, min(20, steps)), start, model))
    model = min(starts)[2]
    for grid in (3, 10, 20, 50):
        model = model if grid == 3 else model.refine(grid)
        fit(model, steps)
        seconds = time.process_time() - clock
        with torch.no_grad():
            found.append(((model(test_x) - test_y).square().mean().sqrt().item(), seconds))
    error, seconds = min(found)
    return {"error": error, "seconds": seconds, "steps": 4 * steps, "parameters": 3 * (50 + 3)}


def notebook_7(seed: int, steps: int, folder: str) -> dict:
    problem = NOTEBOOKS["notebook_7"].problem
    x = problem.test().float()
    on_sides = x[(x.abs() == 1).any(1)]
    clock = time.process_time()
    model = KAN(width=[2, 2, 1], grid=5, k=3, seed=seed, ckpt_path=f"{folder}/model")
    for grid in (5, 10, 20):
        model = model if grid == 5 else model.refine(grid)
        optimizer = LBFGS(
            model.parameters(),
            lr=1,
            history_size=10,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-32,
            tolerance_change=1e-32,
            tolerance_ys=1e-32,
        )

        def loss() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            value = 0.01 * poisson_loss(model, x) + model(on_sides).square().mean()  # noqa: B023
            value.backward()
            return value

        for step in range(steps):
            if step and step % 5 == 0:
                with torch.no_grad():
                    model.update_grid_from_samples(x)
            optimizer.step(loss)
    seconds = time.process_time() - clock
    return {"error": problem.error(model.double()), "seconds": seconds, "steps": 3 * steps, "parameters": 6 * 23}


def poisson_loss(model: KAN, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = [torch.autograd.grad(slopes[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    force = 2 * math.pi**2 * torch.sin(math.pi * x).prod(1)
    return (second[0] + second[1] + force).square().mean()
