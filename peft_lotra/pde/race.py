# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Several starts of `solve`: networks that race for the budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from .adaptive import ResidualSampler
from .boxes import box_points
from .budget import Budget
from .constraints import HardConstraint, Part
from .features import BoxFeatures, OutputScale
from .networks import new_network
from .solution import Solution
from .training import FAILED, Training


POINTS = 1500  # of a step; half of them on a line
HELD_POINTS = 1000  # that are never trained
KINDS: tuple[str, ...] = ("splines", "tanh")  # the first layer of the networks that race
SHARE = 0.1  # of the budget, for each start
FEWEST_STEPS = 8  # of a start, for a race
SMALL_SCALE = 1e-3  # the scale of outputs below which networks of unit size fail
LARGE_SCALE = 50.0  # the scale above which they fail, where `lift` is as large


@dataclass
class Starts:
    """What all starts of a `solve` share, and how the best of them is found.

    Attributes:
        result: The solution, with the model of the first start; steps and phases of all starts are added to it.
        equation, terms, distance, lift, outputs, seed: As for `solve`.
        features: The features of the whole box.
        budget: The steps or seconds that all starts share.
        callback: As for `solve`.
        differentiates: Whether the residual needs points that require a gradient.
        scale: The factor of the outputs of new networks.
        parameter: Of the equation at the end of a continuation; NaN without one.
    """

    result: Solution
    equation: Callable[..., Tensor]
    terms: list[Any]
    distance: Part
    lift: Part
    outputs: int
    seed: int
    features: BoxFeatures
    budget: Budget
    callback: Callable[[Solution, LevenbergMarquardtStep], Any] | None
    differentiates: bool = False
    scale: float = 1.0
    parameter: float = math.nan

    def new_training(
        self,
        model: HardConstraint,
        network: str = "",
        **options: Any,
    ) -> Training:
        """Prepare the training of a model; `options` go to `Training`."""
        result = self.result
        if model is not result.model:
            result = replace(result, model=model)  # with the same lists of steps, phases and notes
        box = result.low.tolist(), result.high.tolist()
        inside = result.inside
        points = box_points(*box, HELD_POINTS, inside=inside, seed=self.seed)
        count = POINTS if len(result.low) > 1 else POINTS // 2
        sampler = ResidualSampler(*box, count, inside=inside, seed=1000 * self.seed)

        training = Training(
            result,
            self.equation,
            self.terms,
            points,
            sampler,
            self.budget,
            self.callback,
            network=network,
            **options,
        )
        training.differentiates = self.differentiates
        return training

    def new_model(self, kind: str, seed: int) -> HardConstraint:
        """Return a new network with the conditions."""
        network = new_network(self.features, self.outputs, seed, kind, scale=self.scale)
        return HardConstraint(network, self.distance, self.lift).double()

    def count_step(self, phase: str, record: LevenbergMarquardtStep, model: HardConstraint) -> None:
        """Count a step of a model, and show it to the caller."""
        result = replace(self.result, model=model)
        result.history.append(record)
        self.budget.count_step(phase, record)
        if self.callback is not None and self.callback(result, record) is True:
            self.budget.is_stopped = True

    def race(self, first: Training, until: float) -> Training:
        """Train several networks for a share of the budget each, and the best one of them until a larger share.

        Where that one stalls, there are more points for a small residual, and new starts for a large one.
        """
        unsolved = FAILED * self.result.first_residual**2
        best = first
        least = first.fit("start", self._share_of_start(until))
        phase = self.result.phases[-1]
        if self.budget.allows_step(until) and phase.steps < FEWEST_STEPS:
            if self.budget.is_timed:
                needed = phase.seconds / phase.steps * FEWEST_STEPS / SHARE
                self.result.notes.append(
                    f"The first network had time for {phase.steps} steps, and no other one was tried. A full run "
                    f"takes about {needed:.0f} s: pass `seconds={needed:.0f}`."
                )
            first.fit_on("coarse", until)
            return first
        number = 0
        while True:
            for kind in KINDS:
                is_tried = number == 0 and kind == first.network
                if is_tried or not self.budget.allows_step(until):
                    continue
                model = self.new_model(kind, self.seed + 1000 * number)
                start = self.new_training(model, kind)
                start_least = start.fit("start", self._share_of_start(until))
                if start_least < least:
                    best = start
                    least = start_least
            if not self.budget.allows_step(until):
                return best

            fitted = best.fit("coarse", until)
            least = min(least, fitted)
            fitted = best.fit_on_more_points("coarse", until, least, unsolved)
            least = min(least, fitted)
            if not best.is_stalled or least <= unsolved:
                return best
            number += 1

    def _share_of_start(self, until: float) -> float:
        """Return the share of the budget at which a start ends that begins now."""
        return min(until, self.budget.spent() + SHARE)


@torch.no_grad()
def scale_outputs(training: Training, network: Any) -> float:
    """Scale the outputs of a new network for a solution whose size is far from 1, and return the factor, else 1.

    Scaled by it, the network changes the residuals by as much as they are without it. This factor is also large for
    solutions that oscillate, but then `lift` is not large. Networks of unit size reach large solutions of large loads.
    """

    def evaluate() -> tuple[Tensor, Tensor]:
        _, residuals = training.evaluate_held()
        return residuals, training.model(training.held)

    residuals, values = evaluate()
    output = network[-1]
    state = copy.deepcopy(output.state_dict())
    for parameter in output.parameters():
        parameter.zero_()
    of_lift, lift = evaluate()
    output.load_state_dict(state)

    scale = (of_lift.norm() / (residuals - of_lift).norm()).item()
    size = (lift.norm() / (values - lift).norm()).item()
    if LARGE_SCALE < min(scale, size) < math.inf:
        scale = min(scale, size)
    elif not 0 < scale < SMALL_SCALE:
        return 1.0
    network.append(OutputScale(output.out_features, scale))
    network.record["layers"][-1] = scale
    return scale
