# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Several starts of `solve`: networks that race for the budget, and windows in time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from .adaptive import ResidualSampler
from .boxes import box_points, side_points
from .budget import Budget
from .constraints import HardConstraint, Part
from .continuation import train_along
from .features import BoxFeatures, OutputScale
from .networks import new_network
from .solution import Solution
from .training import FAILED, Training
from .windows import Windows


POINTS = 1500  # of a step; half of them on a line
HELD_POINTS = 1000  # that are never trained
KINDS: tuple[str, ...] = ("splines", "tanh")  # the first layer of the networks that race
SHARE = 0.1  # of the budget, for each start
FEWEST_STEPS = 8  # of a start, for a race
WINDOWS = 8  # in time, where the whole box fails
SMALL_SCALE = 1e-3  # the scale of outputs below which networks of unit size fail
LARGE_SCALE = 50.0  # the scale above which they fail, where `lift` is as large
INEXACT = 1e-6  # of the first residual's square: above it, a network that stalls may solve another problem
PROMISING = 0.1  # times the residual on the whole box: where the first window shows that windows help


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

    def new_training(
        self,
        model: HardConstraint,
        network: str = "",
        ends: Tensor | None = None,
        **options: Any,
    ) -> Training:
        """Prepare the training of a model on the box, or on a smaller one with other ends (2, I).

        `options` go to `Training`.
        """
        result = self.result
        if model is not result.model:
            result = replace(result, model=model)  # with the same lists of steps, phases and notes
        low, high = [result.low, result.high] if ends is None else ends
        box = low.tolist(), high.tolist()
        inside = result.inside
        points = box_points(*box, HELD_POINTS, inside=inside, seed=self.seed)
        count = POINTS if len(low) > 1 else POINTS // 2
        sampler = ResidualSampler(*box, count, inside=inside, seed=1000 * self.seed)

        terms = self.terms
        if ends is not None:
            terms = [rows_in_box(term, low, high) for term in terms]
            terms = [term for term in terms if len(term[1][0])]
        training = Training(
            result,
            self.equation,
            terms,
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

    def race(self, first: Training) -> Training:
        """Train several networks for a share of the budget each, and the best one of them on.

        Where that one stalls, windows in time may do better. Else there are more points for a small residual, and new
        starts for a large one.
        """
        first_square = self.result.first_residual**2
        unsolved = FAILED * first_square
        inexact = INEXACT * first_square
        best = first
        least = first.fit("start", SHARE)
        if self.budget.allows_step(1.0) and len(self.result.history) < FEWEST_STEPS:
            first.fit_on("coarse", 1.0)
            return first
        number = 0
        while True:
            for kind in KINDS:
                is_tried = number == 0 and kind == first.network
                if is_tried or not self.budget.allows_step(1.0):
                    continue
                model = self.new_model(kind, self.seed + 1000 * number)
                start = self.new_training(model, kind)
                until = min(1.0, self.budget.spent() + SHARE)
                start_least = start.fit("start", until)
                if start_least < least:
                    best = start
                    least = start_least

            # all starts failed on the whole box
            if number == 0 and least > unsolved:
                windows = self._try_windows(best.network, least)
                if windows is not None:
                    return windows
            if not self.budget.allows_step(1.0):
                return best

            fitted = best.fit("coarse", 1.0)
            least = min(least, fitted)
            if best.is_stalled and inexact < least <= unsolved:
                windows = self._try_windows(best.network, least)
                if windows is not None:
                    return windows
            fitted = best.fit_on_more_points("coarse", 1.0, least, unsolved)
            least = min(least, fitted)
            if not best.is_stalled or least <= unsolved:
                return best
            number += 1

    def _try_windows(self, kind: str, least: float) -> Training | None:
        """Return windows in time if there is a time, and they have a lower held-out loss."""
        time, _ = self.find_time()
        if time is None or self.terms or not self.budget.allows_step(1.0):
            return None
        windows = self.fit_windows(WINDOWS, kind, target=PROMISING * least)
        if windows is None or not windows.norm() ** 2 < least:
            return None
        return windows

    def fit_windows(
        self,
        count: int,
        kind: str,
        target: float = math.inf,
        path: tuple[float, float] = (math.nan, math.nan),
    ) -> Training | None:
        """Train networks in windows in time, one after another; None if the first one misses the target."""
        time, smoothness = self.find_time()
        if time is None:
            raise ValueError("`windows` needs a time coordinate: one at whose low side alone `distance` is zero.")
        low = self.result.low
        high = self.result.high
        start = low[time].item()
        stop = high[time].item()
        edges = torch.linspace(start, stop, count + 1, dtype=torch.float64)
        frequencies = list(self.features.frequencies)
        frequencies[time] = []
        boxes = torch.stack([low, high]).repeat(count, 1, 1)
        boxes[:, :, time] = edges.unfold(0, 2, 1)
        networks = []
        for k, (start, end) in enumerate(boxes.tolist()):
            features = BoxFeatures(start, end, self.features.periodic, frequencies=frequencies)
            seed = self.seed + k
            network = new_network(features, self.outputs, seed, kind, is_small=True, scale=self.scale)
            networks.append(network)

        windows = Windows(networks, edges.tolist(), time, smoothness)
        model = HardConstraint(windows, self.distance, self.lift).double()
        try:
            for k, box in enumerate(boxes):
                windows.activate(k)
                if k:
                    continue_network(networks[k - 1], networks[k])
                training = self.new_training(model, f"{kind} in window {k}", box)
                spent = self.budget.spent()
                training.share = spent, spent + (1 - spent) / (count - k)
                if self.callback is not None:
                    training.callback = partial(_call_with_all, windows, self.callback)
                if not math.isnan(path[0]):
                    train_along(training, *path)
                least = training.fit_on("coarse", 1.0)
                if k == 0 and least > target:
                    return None
        finally:  # an interrupted model, too, has all windows
            windows.activate(None)
        return self.new_training(model, parameter=path[1])

    def find_time(self) -> tuple[int | None, int]:
        """Return the time coordinate, and whether 1 or 2 conditions hold at its start.

        It is the last coordinate at whose low side, and not at its high side, a distance is zero: in proportion to
        the time, or to its square.
        """
        low = self.result.low.tolist()
        high = self.result.high.tolist()
        model = self.result.model
        for i in reversed(range(len(low))):
            sizes = []
            for share in (0.0, 1e-4, 2e-4, 1.0):
                points, _ = side_points(low, high, 50, [(i, "low")])
                points[:, i] = low[i] + share * (high[i] - low[i])
                distance = model.part("distance", points, model.kan(points))
                sizes.append(distance.detach().abs().amax(0))
            start, near, farther, end = sizes
            is_prescribed = (start <= 1e-9 * end) & (end > 0)
            if is_prescribed.any():
                is_proportional = farther < 3 * near
                return i, 1 if is_proportional[is_prescribed].any() else 2
        return None, 1


def _call_with_all(
    windows: Windows,
    callback: Callable[..., Any],
    solution: Solution,
    record: LevenbergMarquardtStep,
) -> Any:
    """Show the solution with all of its windows to the caller."""
    active = windows.active
    windows.activate(None)
    answer = callback(solution, record)
    windows.activate(active)
    return answer


@torch.no_grad()
def continue_network(before: nn.Module, network: nn.Module) -> None:
    """Start a network behind its features with the hidden layers of another one, and an output of zero."""
    _, *layers, output = _unscaled(network)
    _, *layers_before, _ = _unscaled(before)
    for layer, other in zip(layers, layers_before, strict=True):
        layer.load_state_dict(other.state_dict())
    for parameter in output.parameters():
        parameter.zero_()


def _unscaled(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a new network before the scale of its outputs."""
    return [layer for layer in network.children() if not isinstance(layer, OutputScale)]


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


def rows_in_box(term: Any, low: Tensor, high: Tensor) -> Any:
    """Return a term with the rows whose points, its first tensor (n, I), are in the box."""
    function, rows, weight = term
    points, *_ = rows
    if points.dim() != 2 or points.shape[1] != len(low):
        raise ValueError(
            f"The first tensor of a term has shape {tuple(points.shape)}, but with `windows` it must be points "
            f"(n, {len(low)}) of the box, each for one window."
        )
    slack = 1e-9 * (high - low)
    is_inside = (points >= low - slack) & (points <= high + slack)
    mask = is_inside.all(1)
    selected = tuple(row[mask] for row in rows)
    return function, selected, weight
