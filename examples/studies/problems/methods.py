# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The compared methods, which turn a network for one parameter of a PDE into a network for another, and their costs.

A run is a list of points (step, seconds, error). Seconds are the CPU time of the process without the evaluation of the
error, since wall-clock time would include other users of the machine.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer, extract_lotra
from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt
from problems.families import Family, relative_error


CACHE = Path.home() / ".cache" / "peft-lotra-pde"


@dataclass(frozen=True)
class Setting:
    """The sizes of an experiment.

    Attributes:
        name: of the setting, kept with the results.
        width, grid_size: of the [2, width, width, 1] KAN.
        points, pretrain_points: collocation points inside the square, for a target and for the base.
        batch: the number of points in a step of Adam.
        adam_steps, lm_steps, pretrain_steps: iterations.
        small: ranks (out, in, basis) of each layer.
        large: ranks of the three layers, two fifths of the parameters in all. The first and the last layer have all
            basis functions, which costs little there: with ranks (8, 2, 4) and (1, 4, 4) for the two, Adam ended with
            3.5 times the error on reaction-diffusion near.
        lora_rank: the rank at which LoRA has at least as many parameters as LoTRA at the large ranks.
    """

    width: int = 16
    grid_size: int = 5
    points: int = 1500
    batch: int = 800
    adam_steps: int = 800
    lm_steps: int = 20
    pretrain_steps: int = 30
    small: tuple[int, int, int] = (4, 4, 4)
    large: tuple[tuple[int, int, int], ...] = ((6, 2, 9), (8, 8, 5), (1, 4, 9))
    lora_rank: int = 2
    name: str = "full"
    pretrain_points: int = 2000


QUICK = Setting(8, 5, 300, 100, 60, 3, 5, (2, 2, 2), ((4, 2, 3), (4, 4, 3), (1, 3, 3)), 1, "quick", 300)

Curve = list[tuple[int, float, float]]


def new_network(setting: Setting, seed: int) -> KAN:
    torch.manual_seed(seed)
    return KAN([2, setting.width, setting.width, 1], setting.grid_size, dtype=torch.float64)


def pretrained(family: Family, setting: Setting, seed: int, cache: Path) -> KAN:
    """The network for the base parameter of the family, by Levenberg-Marquardt or from the cache."""
    sizes = (setting.width, setting.grid_size, setting.pretrain_points, setting.pretrain_steps)
    kind = (*sizes, family.title, family.base, weights_of(family), seed)
    path = cache / f"{family.name}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:12]}.pt"
    network = new_network(setting, seed)
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    terms = family.terms(family.base, torch.Generator().manual_seed(seed), setting.pretrain_points)
    LevenbergMarquardt(network, floor=1e-6).fit(terms, setting.pretrain_steps)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    torch.save(network.state_dict(), part)
    part.replace(path)
    return network


def weights_of(family: Family) -> list[float]:
    return [weight for _, _, weight in family.terms(family.base, torch.Generator().manual_seed(0), 40)]


# Models


def full(base: KAN, setting: Setting, seed: int) -> nn.Module:
    return copy.deepcopy(base)


def scratch(base: KAN, setting: Setting, seed: int) -> nn.Module:
    return new_network(setting, 1000 + seed)


def large_config(setting: Setting) -> LoTRAConfig:
    return LoTRAConfig(r=4, rank_pattern={f"layers.{i}": ranks for i, ranks in enumerate(setting.large)})


def lotra(base: KAN, setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), large_config(setting))


def lotra_small(base: KAN, setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), LoTRAConfig(r=setting.small))


def extract_adapter(base: KAN, tuned: nn.Module, adapted: nn.Module, terms: list[tuple]) -> PeftModel:
    """An adapter that comes closest to `tuned`, with the ranks of `adapted`, or with a tenth of the parameters.

    After one step of all parameters, it has the directions that random factors must learn first, for the time of two
    to three steps. It pays on the elliptic family, at all targets; on the others random factors are as good after as
    many seconds, and better far from the base. `inputs` make the adapter keep what the steps do to the outputs, not to
    the coefficients: without them it begins with five to ten times the error.
    """
    _, (points, *_), _ = terms[0]
    inputs = points[:300]
    if isinstance(adapted, PeftModel):
        config: Any = adapted.peft_config["default"]
        return extract_lotra(copy.deepcopy(base), tuned, config.r, rank_pattern=config.rank_pattern, inputs=inputs)
    size = sum(parameter.numel() for parameter in base.parameters())
    return extract_lotra(copy.deepcopy(base), tuned, budget=size // 10, inputs=inputs)


def lora(base: KAN, setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=setting.lora_rank, lora_alpha=setting.lora_rank, target_modules=[], target_parameters=["spline_weight"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the choice of modules
        return get_peft_model(copy.deepcopy(base), config)


# Optimizers


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: for the table.
        model: `model(base, setting, seed)`.
        lr: the rate of Adam by target, or by family and target; None for Levenberg-Marquardt.
        policy: multipliers of the rate by component of LoTRA; None for one rate.
        full_steps: the first steps of Levenberg-Marquardt take all parameters, see `extract_adapter`.
    """

    title: str
    model: Callable[[KAN, Setting, int], nn.Module]
    lr: dict[str, float] | dict[tuple[str, str], float] | None = None
    policy: dict[str, float] | None = None
    full_steps: int = 0

    def rate(self, family: str, target: str) -> float | None:
        return None if self.lr is None else self.lr.get(target) or self.lr[family, target]

    def adam(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        if self.policy is not None:
            return create_lotra_optimizer(model, torch.optim.Adam, lr=lr, policy=self.policy)
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


# Rates of Adam over 800 steps, seed 0. Full fine-tuning, the rival: for each family the best of 5e-4, 1e-3 and 2e-3
# near, and of 5e-3, 1e-2, 2e-2 and 5e-2 at the other targets. LoTRA and LoRA have one rate for all families: the best
# of 1e-2, 2e-2 and 4e-2 near and at the middle (LoRA: of 5e-3, 2e-2 and 4e-2 near), of 1e-2, 2e-2 and 5e-2 far (LoRA:
# LoTRA's). One rate for all components: the better of 1e-2 and 2e-2 near, where 2e-2 is twice as bad on two families.
# From scratch: the best of two or three on one target.
FULL_LR = {
    ("elliptic", "near"): 1e-3,
    ("elliptic", "middle"): 1e-2,
    ("elliptic", "far"): 5e-2,
    ("allen_cahn", "near"): 1e-3,
    ("allen_cahn", "middle"): 5e-3,
    ("allen_cahn", "far"): 5e-3,
    ("reaction_diffusion", "near"): 1e-3,
    ("reaction_diffusion", "middle"): 2e-2,
    ("reaction_diffusion", "far"): 5e-2,
    ("burgers", "near"): 2e-3,
    ("burgers", "middle"): 5e-2,
    ("burgers", "far"): 2e-2,
}
COMPONENT_RATES = {"factor_out": 0.3, "factor_basis": 3.0}
LOTRA_LR = {"near": 2e-2, "middle": 4e-2, "far": 5e-2}

METHODS = {
    "scratch_adam": Method("from scratch, Adam", scratch, {"near": 5e-2, "middle": 5e-2, "far": 5e-2}),
    "full_adam": Method("full fine-tuning, Adam", full, FULL_LR),
    "lora_adam": Method("LoRA, Adam", lora, LOTRA_LR),
    "lotra_small_adam": Method("LoTRA small, Adam", lotra_small, LOTRA_LR, COMPONENT_RATES),
    "lotra_adam": Method("LoTRA large, Adam", lotra, LOTRA_LR, COMPONENT_RATES),
    "lotra_uniform_adam": Method("LoTRA large, Adam, one rate", lotra, {"near": 1e-2, "middle": 2e-2, "far": 2e-2}),
    "lotra_small_lm": Method("LoTRA small, LM", lotra_small, full_steps=1),
    "lotra_lm": Method("LoTRA large, LM", lotra, full_steps=1),
    "lotra_random_lm": Method("LoTRA large, LM, random start", lotra),
    "full_lm": Method("full fine-tuning, LM", full),
    "tenth_lm": Method("LM: 10 full steps, then a tenth of the parameters", full, full_steps=10),
}


def train(
    method: Method,
    family: Family,
    target: str,
    parameter: float,
    base: KAN,
    setting: Setting,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> tuple[nn.Module, Curve]:
    """The trained model and its run; calls `advance` after each point of the run."""
    terms = family.terms(parameter, torch.Generator().manual_seed(100 + seed), setting.points)
    solution = family.reference(parameter)
    model = method.model(base, setting, seed)
    curve: Curve = [(0, 0.0, relative_error(model, solution))]
    seconds, started = 0.0, time.process_time()

    def record(step: int) -> None:
        nonlocal seconds, started
        seconds += time.process_time() - started
        curve.append((step, seconds, relative_error(model, solution)))
        advance()
        started = time.process_time()

    if method.lr is None:
        if method.full_steps:
            tuned = copy.deepcopy(base)
            optimizer = LevenbergMarquardt(tuned, floor=1e-6)
            for _ in range(method.full_steps):
                optimizer.step(terms)
            model = extract_adapter(base, tuned, model, terms)
            record(method.full_steps)
        optimizer = LevenbergMarquardt(model, floor=1e-6)
        for step in range(1 + method.full_steps, setting.lm_steps + 1):
            accepted = optimizer.step(terms).accepted
            record(step)
            if not accepted:
                break
        return model, curve

    optimizer = method.adam(model, method.rate(family.name, target))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], setting.adam_steps, pct_start=0.05
    )
    generator = torch.Generator().manual_seed(200 + seed)
    every = max(1, setting.adam_steps // 40)
    for step in range(1, setting.adam_steps + 1):
        loss = adam_loss(model, terms, setting.batch, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0:
            record(step)
    return model, curve


def adam_loss(model: nn.Module, terms: list[tuple], batch: int, generator: torch.Generator) -> Tensor:
    """The loss that Levenberg-Marquardt minimizes, on a random part of the rows of each term."""
    loss = 0.0
    for residual, rows, weight in terms:
        index = torch.randint(len(rows[0]), (min(batch, len(rows[0])),), generator=generator)
        loss = loss + weight * residual(model, *(row[index] for row in rows)).square().sum(-1).mean()
    return loss


def run_path(method: str, family: Family, target: str, setting: Setting, seed: int, cache: Path) -> Path:
    """The cache file of one line of the results; each setting has its own name."""
    rate = METHODS[method].rate(family.name, target)
    problem = (family.title, family.base, family.targets[target], weights_of(family))
    kind = (method, rate, METHODS[method].policy, METHODS[method].full_steps, *problem, seed, setting)
    digest = hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
    return cache / "runs" / f"{family.name}-{target}-{seed}-{method}-{digest}.json"


def run(method: str, family: Family, target: str, setting: Setting, seed: int, cache: Path) -> dict:
    """One line of the results, read from the cache if it exists there."""
    parameter = family.targets[target]
    path = run_path(method, family, target, setting, seed, cache)
    if path.exists():
        return json.loads(path.read_text())
    base = pretrained(family, setting, seed, cache)
    model, curve = train(METHODS[method], family, target, parameter, base, setting, seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = {
        "family": family.name,
        "target": target,
        "parameter": parameter,
        "seed": seed,
        "method": method,
        "trainable": trainable,
        "share": round(trainable / sum(p.numel() for p in base.parameters()), 4),
        "kilobytes": trainable * 4 / 1000,  # as float32
        "setting": setting.name,
        "curve": [(step, round(seconds, 3), float(f"{error:.4g}")) for step, seconds, error in curve],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(line))
    part.replace(path)
    return line
