# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One call from the equation to the solution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from ..least_squares.problem import check_terms
from ..modules.checks import check_count, check_function, check_list, check_number
from .boxes import Inside, box_points, check_box, edge_points, side_points
from .budget import Budget
from .checks import check_model, count_outputs, outside_grids
from .constraints import HardConstraint, Part
from .continuation import STAGES, train_along
from .diagnostics import describe_outcome, find_doubts, find_unmet
from .features import BoxFeatures
from .marching import SOLVED, TRAINED, Polynomials
from .networks import find_kan, first_module, new_network, prepare_network
from .noise import FITTED, Estimation
from .race import HELD_POINTS, KINDS, Starts, scale_outputs
from .solution import Solution
from .training import Training
from .unknowns import NetworkWithConstants, Unknowns
from .windows import Windows


@torch.inference_mode(False)
def solve(
    residual: Callable[..., Tensor],
    low: Sequence[float],
    high: Sequence[float],
    *,
    distance: Part,
    lift: Part = 0.0,
    periodic: Collection[int] = (),
    terms: Sequence[Any] = (),
    inside: Inside | None = None,
    continuation: tuple[float, float] | None = None,
    unknowns: Unknowns | None = None,
    network: nn.Module | None = None,
    seconds: float = 60.0,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    callback: Callable[[Solution, LevenbergMarquardtStep], Any] | None = None,
) -> Solution:
    r"""Solve a PDE on a box: find u = lift + distance network whose residual is small everywhere, and its error.

    Without `network`, `continuation` and `unknowns`, products of polynomials and waves come first, more and more of
    them, until the change of u shows that its error is below 1e-5. If there is a time (the last coordinate at whose
    low side alone `distance` is zero), and the whole box is too hard, windows in time follow one another: each is as
    long as its error allows. A second march with smaller errors tells the error of the first one.

    Where polynomials are not accurate, networks are trained by Levenberg-Marquardt: a layer of splines of each
    coordinate and three tanh layers, on the box scaled to [-1, 1]. Each step has new points, a third of them where the
    residual is large, and residuals count less where u is steep. This network races with one of tanh layers only. Each
    gets a tenth of the budget, and the one with the lower held-out residual goes on. After a stall, steps have twice
    as many points, and a large residual is followed by new starts. A tenth of the budget is left for polynomials that
    correct the network: they tell its error.

    A continuation goes from an easy parameter to the wanted one in six steps of equal ratio, or of equal length if
    zero is between them; a step that ends in a poor minimum is undone, and a quarter of it taken.

    If a `KAN` is given, its grids are twice as fine for the last fifth of the budget. Steps there that do not lower
    the held-out residual are undone. The grids stay if not all of its parameters are trained, as with adapters, or if
    the network is the model of a `Solution`.

    Args:
        residual: `residual(model, x)`, or `residual(model, x, parameter)` with `continuation`: takes points (n, I) to
            residuals (n,) or (n, m), row by row, usually by `jet(model, x)`, or by `torch.autograd.grad`.
        low, high: The ends of the box, I numbers each.
        distance, lift: The exact conditions, see `HardConstraint`; `BoxDistance` is a distance for sides of the box. A
            new network has as many outputs as one of them has columns, for several unknown functions.
        periodic: The indices of periodic coordinates.
        terms: Other residual terms, (function, rows) or (function, rows, weight) as for `LevenbergMarquardt`: data, or
            conditions that are not exact, by `robin` too.
        inside: Takes points (n, I) to (n,) bool: the equation holds in this part of the box (`disk(...).inside`).
            `distance` must be zero on its boundary unless there are `terms`.
        continuation: The first and the last parameter of the equation.
        unknowns: Constants of the equation to be trained with the network, by name: the start of each, or (start, low,
            high) with None for an open end. The equation and the functions of `terms` get those that they name as
            keyword arguments behind the others, with `**kwargs` all: float64 tensors of shape (). Terms without a
            weight are data: they weigh much at first, and less later.
        network: A KAN (`KAN([I, 8, 8, outputs], 8, 5, norm="tanh")`, for adapters of all layers), an MLP or another
            one, (n, I) to (n, outputs). It is trained in place and becomes float64; the model of a `Solution` is
            copied instead. The box is scaled to [-1, 1] in front of it unless its grids are the box.
        seconds: The time budget. No step begins that would exceed it if it took as long as the last one.
        steps: The number of steps to take instead: the same result on a busy machine. A quarter as many follow for the
            estimate of the error.
        seed: Of the network and the points.
        progress: Whether to show a bar.
        callback: Called after each step with the solution so far and the record of the step, the last one of
            `solution.history`. It may save or plot the solution. The training ends if it returns True.

    Returns:
        The solution; `result.model(x)` evaluates it, and warns once outside of the box. `result.error` estimates its
        relative L2 error (NaN if it is not known), `result.unknowns` has the estimates of constants, and
        `result.phases` name the network of each phase.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The box is empty; `distance` is zero everywhere, or not on a side of the box, or on the boundary of
            `inside`, and there are no `terms`; `inside` is true nowhere, or everywhere; the network has other inputs;
            residuals are not finite, of a wrong shape, or depend on other rows; a number is out
            of range; no function takes a constant, it starts outside of its interval, or has no effect. Nothing is
            trained then.

    Warns:
        UserWarning: The solution may be wrong. `distance`, `lift` or `network` has a kink or a jump, or is not
            periodic as `periodic` says. A residual depends on a tensor that is not trained. The estimated error is
            above 5 %, or not known while the residual is large. Activations leave the grids of KAN layers.

    Source: docs/pde.md describes the parts, docs/pde_results.md the accuracy.

    Example:
        >>> from peft_lotra.kan import jet
        >>> from peft_lotra.pde import BoxDistance, solve
        >>> def poisson(model, x):  # u'' = -1 on [0, 10], u = 0 at both ends
        ...     return jet(model, x)[2][0] + 1
        >>> box = BoxDistance([0], [10])
        >>> result = solve(poisson, [0], [10], distance=box, steps=14, progress=False)
        >>> middle = torch.tensor([[5.0]], dtype=torch.float64)
        >>> abs(result.model(middle).item() - 12.5) < 0.1
        True
    """
    low_end, high_end = check_box(low, high)
    start = stop = math.nan
    if continuation is not None:
        ends = check_list(continuation, "continuation", "two numbers, the first and the last parameter", 2)
        start, stop = (check_number(end, "continuation", "(-inf, inf)") for end in ends)
    positional = 2 if continuation is None else 3
    check_function(residual, "residual", None if unknowns else positional)
    if steps is not None:
        stages = 1 if continuation is None else STAGES + 1
        check_count(steps, "steps", low=stages)
    check_number(seconds, "seconds", "(0, inf)")
    if callback is not None:
        check_function(callback, "callback", 2)
    if inside is None:
        points, _ = side_points(low, high, 50)
        sides = points.split(50)
    else:
        check_function(inside, "inside", 1)
        sides = [edge_points(inside, low, high)]

    terms = check_list(terms, "terms", "a list of residual terms (function, rows)")
    checked_terms = check_terms(terms) if terms else []
    is_new = network is None
    features = BoxFeatures(low, high, periodic)
    held = box_points(low, high, HELD_POINTS, inside=inside, seed=seed)
    kan = None
    if network is None:
        network = new_network(features, count_outputs(held, distance, lift), seed)
    else:
        prepared = prepare_network(network, features)
        kan = find_kan(network)
        network = prepared
    model = HardConstraint(network, distance, lift).double()
    outputs = check_model(model, held, sides, bool(terms))
    constants = None
    data = []
    if unknowns:
        constants = NetworkWithConstants(model, unknowns)
        residual, checked_terms, data = constants.bind(residual, positional, terms, checked_terms)
        if callback is not None:
            callback = constants.report_to(callback)
    result = Solution(model, low_end, high_end, inside)

    def warn(message: str) -> None:
        result.notes.append(message)
        warnings.warn(message, stacklevel=4)

    with Budget(seconds, steps, progress) as budget:
        starts = Starts(result, residual, checked_terms, distance, lift, outputs, seed, features, budget, callback)
        kind = KINDS[0] if is_new else ""
        training = starts.new_training(model, kind, parameter=start, trained=constants)
        result.first_residual = training.norm()
        starts.differentiates = training.differentiates
        if is_new:
            starts.scale = scale_outputs(training, network)
            if starts.scale != 1.0:
                result.first_residual = training.norm()
        first_losses = training.condition_losses()
        held_terms = training.held_terms()
        for doubt in find_doubts(training.trained, low_end, high_end, inside, held_terms):
            warn(doubt)
        fit = training.fit_on
        estimation = None
        if constants is not None:
            estimation = Estimation(training, constants, data)
            estimation.check_effects()
            fit = estimation.fit
            training.share = 0.0, FITTED

        # the rest of the time, or steps beyond those of the caller, are for the estimate of the error
        trained = TRAINED if steps is None else 1.0
        if continuation is not None:
            training.share = 0.0, trained
            train_along(training, start, stop)
            training.finish(fit, kan)
        elif constants is not None:
            training.finish(fit, kan)
        elif is_new:
            training = _solve_new(starts, training, trained)
        else:
            training.share = 0.0, trained
            training.finish(fit, kan)
        result.model = training.model
        if constants is None and not (is_new and continuation is None):
            starts.parameter = stop
            with suppress(Exception):  # an equation may take this network alone, and its solution must not be lost
                result.error = Polynomials(starts).estimate_error(result.model)
        if estimation is not None:
            training.share = 0.0, 1.0
            estimates, doubts = estimation.estimate()
            for doubt in doubts:
                warn(doubt)
            result.unknowns = estimates  # callbacks have seen them without errors
        result.residual = training.norm()
        if is_new and result.phases[-1].reason != "callback":  # another network may meet them before
            last_losses = training.condition_losses()
            for doubt in find_unmet(first_losses, last_losses, result.first_residual**2):
                result.notes.append(doubt)
                if steps is None:
                    warnings.warn(doubt, stacklevel=3)

        scale = result.first_residual
        if not is_new:  # `network` may be a solution already
            with suppress(Exception):
                untrained = starts.new_model(KINDS[0], seed)
                if constants is not None:
                    constants = NetworkWithConstants(untrained, unknowns or {})
                first = starts.new_training(untrained, parameter=stop, trained=constants)
                first.norm()
                scale_outputs(first, untrained.kan)
                scale = first.norm()

    outcome = describe_outcome(result, scale)
    if outcome and steps is not None and result.phases[-1].reason == "budget":
        result.notes.append(outcome)  # who gives few `steps` wants no more
    elif outcome:
        warn(outcome)
    if not is_new and not first_module(model, Windows):  # features are on the grids of new networks
        for name, share in outside_grids(model, held):
            warn(
                f"{share:.0%} of the inputs of `{name}` are outside of its grid, where its splines are zero. Bound "
                "them by `KAN(norm='tanh')`, or give a wider `grid_range`."
            )
    return result


def _solve_new(starts: Starts, first: Training, trained: float) -> Training:
    """Solve by polynomials, and where their error is too large, by networks that race; return the better ones.

    Args:
        starts: What all starts share.
        first: The training of the first network.
        trained: The share of the budget for all of it.
    """
    result = starts.result
    polynomials = Polynomials(starts)
    candidate = polynomials.solve()
    if starts.budget.is_stopped:
        return starts.new_training(polynomials.model)
    if candidate is not None and (candidate.error <= SOLVED or not starts.budget.allows_step(trained)):
        result.error = candidate.error
        return starts.new_training(candidate.model)
    if not starts.budget.allows_step(trained) and polynomials.steps:
        return starts.new_training(polynomials.model)

    best = starts.race(first, trained)
    error = polynomials.estimate_error(best.model)
    if candidate is None:
        result.error = error
        return best
    other = starts.new_training(candidate.model)
    is_better = candidate.error < error
    if math.isnan(error):
        is_better = other.norm() < best.norm()
        error = candidate.error + polynomials.difference(best.model, candidate.model)
    result.error = candidate.error if is_better else error
    return other if is_better else best
