# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Standard problems whose parameter moves, and the methods that follow it from a trained base.

A run is a list of points (step, seconds, error). Seconds are the CPU time of the process without the evaluation of the
error.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import HardConstraint, ResidualSampler
from problems.methods import adam_loss, full
from problems.recipe import QUICK, Collocation, Recipe, Run, constrained
from problems.standard import PROBLEMS, Problem


MOVES = {
    "burgers": replace(PROBLEMS["burgers"], title="Burgers, 0.01/pi to 0.005/pi", stop=0.005 / math.pi),
    "allen_cahn": replace(PROBLEMS["allen_cahn"], title="Allen-Cahn, 1e-4 to 2.5e-5", stop=2.5e-5, resolution=600),
    "helmholtz": replace(PROBLEMS["helmholtz"], title="Helmholtz, (1, 4) to (1, 5)", start=5.0, stop=5.0),
}

Ranks = tuple[tuple[int, int, int], ...]
Curve = list[tuple[int, float, float]]


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        base: the recipe of the base. A wide network has more parameters than a step has residuals:
            Levenberg-Marquardt then solves in the space of residuals, and carries nothing over to the next step.
        seconds: CPU seconds of each run.
        core: ranks (out, in, basis) of the three layers, whose cores alone are trained.
        points, keep: collocation points of a step of Levenberg-Marquardt, and the steps that they are kept for; for
            all parameters see `FULL_KEEP`.
        adam_points, adam_keep: how many of them a step of Adam takes, and the steps that they are kept for.
    """

    base: Recipe
    seconds: float
    core: Ranks
    points: int = 700
    keep: int = 4
    adam_points: int = 500
    adam_keep: int = 10


# On wide networks the base takes fewer steps, on fewer points, and keeps its grids.
WIDE = replace(Recipe(), width=32, steps=5, most=8, points=700, settle=6, settle_points=1000, refined=8, last=0)
WIDE = replace(WIDE, forgetting=0.0, last_forgetting=0.0)
SETTINGS = {
    10: Setting(
        replace(Recipe(), width=10, refined=8, last=0),
        seconds=8.0,
        core=((10, 2, 14), (2, 2, 14), (1, 10, 14)),
    ),
    32: Setting(
        WIDE,
        seconds=16.0,
        core=((32, 2, 14), (8, 8, 14), (1, 32, 14)),
    ),
    64: Setting(
        replace(WIDE, width=64),
        seconds=40.0,
        core=((64, 2, 14), (11, 11, 14), (1, 64, 14)),
    ),
}
TINY = ((2, 2, 9), (2, 2, 9), (1, 2, 9))
QUICK_SETTING = Setting(replace(QUICK, refined=4, last=0), 0.3, TINY, points=100, keep=2, adam_points=50)
# the better of 1 and 4 for all parameters on seed 0, width 32
FULL_KEEP = {"burgers": 4, "allen_cahn": 1, "helmholtz": 1}


# Bases


def base_of(name: str, setting: Setting, seed: int, cache: Path, console: Console) -> tuple[HardConstraint, list]:
    """The network that solves the problem before it moves, and the curve of its training; kept in the cache."""
    digest = hashlib.sha256(repr((name, setting.base, seed)).encode()).hexdigest()[:12]
    path = cache / f"move-{name}-{setting.base.width}-{seed}-{digest}.pt"
    if not path.exists():
        run = Run(PROBLEMS[name], setting.base, seed, console)
        run.train()
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        torch.save((run.network, run.curve), part)
        part.replace(path)
    kan, curve = torch.load(path, weights_only=False)  # of our own cache: the grids are in the module
    return constrained(PROBLEMS[name], kan), curve


# Models


def core(base: HardConstraint, setting: Setting, seed: int) -> nn.Module:
    """Cores on the factors of the HOSVD of the base, which stay."""
    names = [name for name, layer in base.named_modules() if hasattr(layer, "spline_weight")]
    pattern = dict(zip(names, setting.core, strict=True))
    config = LoTRAConfig(rank_pattern=pattern, train=["core"], init_weights="hosvd")
    return get_peft_model(copy.deepcopy(base), config)


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        title: for the table.
        model: `model(base, setting, seed)`.
        lr: the rate of Adam; None for Levenberg-Marquardt.
    """

    title: str
    model: Callable[..., nn.Module]
    lr: float | None = None


# the rate of Adam: the best of 1e-4 to 1e-2 in steps of about 3, over the three problems on seed 0, width 32
METHODS = {
    "full_lm": Method("all parameters, LM", full),
    "core_lm": Method("cores only, LM", core),
    "full_adam": Method("all parameters, Adam", full, 3e-4),
}


# Training


class Clock:
    """CPU seconds, and the errors at about `marks` of them."""

    def __init__(self, seconds: float, error: Callable[[], float], marks: int = 8) -> None:
        self.limit, self.error, self.every = seconds, error, seconds / marks
        self.step, self.seconds, self.curve = 0, 0.0, [(0, 0.0, error())]
        self.started = time.process_time()

    def running(self) -> bool:
        """Called after each step, and before the first one."""
        self.seconds += time.process_time() - self.started
        done = self.seconds >= self.limit
        if self.step and (done or self.seconds >= self.curve[-1][1] + self.every):
            self.curve.append((self.step, self.seconds, self.error()))
        self.step += 1
        self.started = time.process_time()
        return not done


def train(method: Method, problem: Problem, base: HardConstraint, setting: Setting, seed: int) -> tuple:
    """The trained model and its curve."""
    torch.manual_seed(seed)
    problem.reference()  # outside of the seconds
    model = method.model(base, setting, seed)
    sampler = ResidualSampler(problem.low, problem.high, setting.points, seed=1000 * seed + 500)
    points = Collocation(problem, problem.stop, model, sampler, setting.base.slope_scale)
    follow = _levenberg_marquardt if method.lr is None else _adam
    clock = Clock(setting.seconds, lambda: problem.error(model))
    follow(method, model, points, setting, clock)
    return model, clock.curve


def _levenberg_marquardt(
    method: Method, model: nn.Module, points: Collocation, setting: Setting, clock: Clock
) -> None:
    optimizer = LevenbergMarquardt(model, floor=1e-6, memory=2**32)
    keep = FULL_KEEP[points.problem.name] if method.model is full else setting.keep
    terms: list[tuple] = []
    while clock.running():
        if clock.step % keep == 1 or keep == 1:
            terms = points.terms()
        optimizer.step(terms)
        optimizer.damping = min(optimizer.damping, 1e3)


def _adam(method: Method, model: nn.Module, points: Collocation, setting: Setting, clock: Clock) -> None:
    """By the rate of `method`, reached in a twentieth of the seconds, and to zero at the end by a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=method.lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    terms: list[tuple] = []
    while clock.running():
        if clock.step % setting.adam_keep == 1:
            terms = points.terms()
        share = min(clock.seconds / clock.limit, 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(share / 0.05, 0.5 * (1 + math.cos(math.pi * share)))
        loss = adam_loss(model, terms, setting.adam_points, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Results


def run(name: str, key: str, base: HardConstraint, setting: Setting, seed: int) -> dict:
    """One line of the results."""
    model, curve = train(METHODS[key], MOVES[name], base, setting, seed)
    step, seconds, error = curve[-1]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "seed": seed,
        "parameters": trained,
        "share": round(trained / sum(p.numel() for p in base.parameters()), 4),
        "seconds_per_step": round(seconds / step, 4),
        "error": error,
        "seconds": seconds,
        "curve": [(step, round(seconds, 3), float(f"{error:.4g}")) for step, seconds, error in curve],
    }
