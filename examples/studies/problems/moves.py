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
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer, extract_lotra
from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.pde import HardConstraint, ResidualSampler, box_points
from problems.methods import COMPONENT_RATES, adam_loss, full, lora
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
        core: ranks (out, in, basis) of the three layers where the cores alone are trained.
        all_components: ranks where the factors are trained too, for about as many parameters as `equal`.
        equal: ranks where the cores alone are trained, for two fifths of the parameters.
        lora_rank: at which LoRA has about as many parameters.
        points, keep: collocation points of a step of Levenberg-Marquardt, and the steps that they are kept for; for
            all parameters see `FULL_KEEP`.
        adam_points, adam_keep: how many of them a step of Adam takes, and the steps that they are kept for.
    """

    base: Recipe
    seconds: float
    core: Ranks
    equal: Ranks
    all_components: Ranks
    lora_rank: int
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
        equal=((10, 2, 14), (4, 4, 14), (1, 10, 14)),
        all_components=((4, 2, 8), (3, 4, 8), (1, 4, 8)),
        lora_rank=1,
    ),
    32: Setting(
        WIDE,
        seconds=16.0,
        core=((32, 2, 14), (8, 8, 14), (1, 32, 14)),
        equal=((32, 2, 14), (18, 18, 14), (1, 32, 14)),
        all_components=((12, 2, 14), (15, 15, 14), (1, 12, 14)),
        lora_rank=3,
    ),
    64: Setting(
        replace(WIDE, width=64),
        seconds=40.0,
        core=((64, 2, 14), (11, 11, 14), (1, 64, 14)),
        equal=((64, 2, 14), (39, 39, 14), (1, 64, 14)),
        all_components=((24, 2, 14), (32, 32, 14), (1, 24, 14)),
        lora_rank=4,
    ),
}
TINY = ((2, 2, 9), (2, 2, 9), (1, 2, 9))
QUICK_SETTING = Setting(
    replace(QUICK, refined=4, last=0), 0.3, TINY, TINY, TINY, 1, points=100, keep=2, adam_points=50
)
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


def network_of(model: nn.Module) -> KAN:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).kan[1]


def pattern_of(base: HardConstraint, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    names = [name for name, layer in base.named_modules() if hasattr(layer, "spline_weight")]
    return dict(zip(names, ranks, strict=True))


def cores(base: HardConstraint, ranks: Ranks) -> nn.Module:
    """Cores on the factors of the HOSVD of the base, which stay."""
    config = LoTRAConfig(rank_pattern=pattern_of(base, ranks), train=["core"], init_weights="hosvd")
    return get_peft_model(copy.deepcopy(base), config)


def core(base: HardConstraint, setting: Setting, seed: int) -> nn.Module:
    return cores(base, setting.core)


def equal_core(base: HardConstraint, setting: Setting, seed: int) -> nn.Module:
    return cores(base, setting.equal)


def lotra(base: HardConstraint, setting: Setting, seed: int) -> nn.Module:
    config = LoTRAConfig(rank_pattern=pattern_of(base, setting.all_components), init_weights="hosvd")
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


# rates of Adam: the best of 1e-4 to 1e-2 in steps of about 3, over the three problems on seed 0, width 32
METHODS = {
    "full_lm": Method("all parameters, LM", full),
    "core_lm": Method("cores only, LM", core),
    "equal_core_lm": Method("cores only, 40 %, LM", equal_core),
    "lotra_lm": Method("LoTRA, LM", lotra),
    "lora_lm": Method("LoRA, LM", lora),
    "full_adam": Method("all parameters, Adam", full, 3e-4),
    "core_adam": Method("cores only, Adam", core, 3e-4),
    "lotra_adam": Method("LoTRA, Adam", lotra, 1e-4),
    "lora_adam": Method("LoRA, Adam", lora, 1e-4),
}
EXTRACTED = "full LM, then extract_lotra"


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
    if method.model is lotra:
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=method.lr, policy=COMPONENT_RATES)
    else:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=method.lr)
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


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stored_bytes(model: nn.Module) -> int:
    """Of an adapter's tensors, or of all parameters."""
    tensors = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else dict(model.named_parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def run(name: str, key: str, base: HardConstraint, setting: Setting, seed: int) -> dict[str, dict]:
    """One line of the results by method; a full LM fit gives two, with what `extract_lotra` makes of it."""
    problem, method = MOVES[name], METHODS[key]
    model, curve = train(method, problem, base, setting, seed)
    found = {key: _line(seed, base, model, curve)}
    if key == "full_lm":
        started = time.process_time()
        inputs = box_points(problem.low, problem.high, 500, seed=seed)
        pattern = pattern_of(base, setting.all_components)
        extracted = extract_lotra(copy.deepcopy(base), model, rank_pattern=pattern, inputs=inputs)
        step, seconds, _ = curve[-1]
        seconds += time.process_time() - started
        found["extracted_lm"] = _line(seed, base, extracted, [*curve, (step, seconds, problem.error(extracted))])
    return found


def _line(seed: int, base: nn.Module, model: nn.Module, curve: Curve) -> dict:
    step, seconds, error = curve[-1]
    return {
        "seed": seed,
        "parameters": trainable(model),
        "share": round(trainable(model) / sum(p.numel() for p in base.parameters()), 4),
        "bytes": stored_bytes(model),
        "seconds_per_step": round(seconds / step, 4),
        "error": error,
        "seconds": seconds,
        "curve": [(step, round(seconds, 3), float(f"{error:.4g}")) for step, seconds, error in curve],
    }
