# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Warnings of solutions that are wrong although their residual is small, and advice if it is large."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..least_squares.problem import TRIAL_ROWS, Intercepted
from .boxes import Inside, box_points, contains, spread_points
from .constraints import HardConstraint, jet_of_function
from .features import BoxFeatures
from .networks import first_module
from .solution import Solution
from .windows import Windows


LINES = 32  # along each coordinate; half of them are near the edges of the box
NEAR = 1e-6  # distance from the edges, as a share of the box
INTERVALS = 1024  # of a line
HALVINGS = 5  # of intervals, around the largest fourth difference
ROUGH = 1.5  # the order at which fourth differences fall: 4 for smooth functions, 1 at a kink, 0 at a jump
KINK = 0.01  # the least change of slope, as a share of the largest value across the box
JUMP = 0.05  # the least jump near an edge, where distances may have corners

PERIODIC = 1e-5  # of the largest value, or slope

UNMET = 0.3  # of the first residual of a condition
ROUNDING = 1e-20  # the loss of a condition that always holds, as a share of that of the equation

LARGE_ERROR = 0.05
SMALL_RESIDUAL = 1e-4  # of the first residual: below it, a solution whose error is not known may be right


def list_functions(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the functions among the distances and lifts of a model, with the names of their arguments."""
    arguments: list[tuple[str, Any]] = []
    for module in model.modules():
        if isinstance(module, HardConstraint):
            arguments += [("distance", module.distance), ("lift", module.lift)]
    return [(name, function) for name, function in arguments if callable(function)]


def find_doubts(
    model: Any,
    low: Tensor,
    high: Tensor,
    inside: Inside | None,
    terms: Sequence[Any],
) -> Iterator[str]:
    """Yield messages on what makes solutions wrong.

    These are kinks and jumps, missing periodicity, untrained tensors, and points outside of the box.

    Args:
        model: The `HardConstraint`, or a module of it and unknown constants.
        low, high: The ends of the box, (I,).
        inside: The part of the box where the equation holds.
        terms: The equation and the terms of the caller, (function, rows, weight).
    """
    functions = list_functions(model)
    smooth = list(functions)
    network = first_module(model, HardConstraint).kan
    if first_module(network, Windows) is None:
        smooth.append(("network", network))
    for name, function in smooth:
        point = find_kink(function, low, high, inside)
        if point is None:
            continue
        position = ", ".join(f"{number:.4g}" for number in point.tolist())
        dtype = function(point.unsqueeze(0)).dtype
        if dtype == torch.float64:
            yield (
                f"`{name}` has a kink or a jump near ({position}), which the residual between the points does not "
                f"see. The solution is likely wrong: give a smooth `{name}`, without ReLU, `abs` or `where`."
            )
        else:
            yield (
                f"`{name}` returns {dtype}, whose rounding near ({position}) looks like a jump. Compute it in "
                "float64, the dtype of its argument."
            )

    features = first_module(model, BoxFeatures)
    periodic = [] if features is None else features.periodic
    for name, function in functions:
        for i in periodic:
            if not is_periodic(function, low, high, i):
                yield (
                    f"`{name}` is not periodic in coordinate {i}, which `periodic` names. Give one with the same "
                    "values and slopes at both ends."
                )

    _, *other_terms = terms
    for number, (function, rows, _) in enumerate(other_terms):
        count = _count_outside(model, function, rows, low, high, periodic)
        if count:
            yield (
                f"{count} points of term {number} of `terms` are outside of the box from {low.tolist()} to "
                f"{high.tolist()}, where the equation does not hold. Pass a larger box, or leave them out."
            )

    for name, leaf in _find_untrained(model, terms):
        yield (
            f"{name} depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient, but is not trained. "
            "To estimate it, pass its start by `unknowns`. If it is constant, call `requires_grad_(False)`."
        )


@torch.no_grad()
def find_kink(
    function: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    inside: Inside | None,
) -> Tensor | None:
    """Return a point (I,) inside where a function has a kink or a jump; None if it is smooth.

    Along each coordinate, the largest fourth difference of each line is followed to smaller and smaller intervals.
    """
    dimensions = len(low)
    lines = box_points([0.0] * dimensions, [1.0] * dimensions, LINES)
    near_edges = slice(LINES // 2, None)
    lines[near_edges] = lines[near_edges].round().clamp(NEAR, 1 - NEAR)
    for i in range(dimensions):
        centers = torch.full((LINES, 1), 0.5, dtype=torch.float64)
        reach = INTERVALS // 2
        step = 1 / INTERVALS
        scale = 0.0
        sizes = []
        for _ in range(HALVINGS + 1):
            offsets = step * torch.arange(-reach, reach + 1, dtype=torch.float64)
            shares = centers + offsets
            x = lines.repeat_interleave(len(offsets), 0)
            x[:, i] = shares.clamp(0, 1).flatten()
            x = torch.lerp(low, high, x)
            values = function(x)
            if inside is not None:
                is_inside = contains(inside, x).unsqueeze(1)
                values = values.where(is_inside, math.nan)
            values = values.view(LINES, len(offsets), -1)
            largest = values.nan_to_num(0, 0, 0).abs().max()
            scale = max(scale, largest.item())

            differences = values.diff(4, dim=1).nan_to_num(0, 0, 0)
            size, index = differences.abs().amax(2).max(1)
            sizes.append(size)

            # around the middle of the five values of the largest difference
            reach = 4
            step /= 2
            margin = reach * step
            centers = shares.gather(1, index.unsqueeze(1) + 2)
            centers = centers.clamp(margin, 1 - margin)

        last_step = 2 * step
        smallest = torch.full_like(size, KINK * last_step * scale)
        smallest[near_edges] = JUMP * scale
        # the first size may be at another point
        decay = 2 ** (ROUGH * (HALVINGS - 1))
        is_rough = (sizes[1] < decay * size) & (size > smallest)
        if is_rough.any():
            line = int(is_rough.nonzero()[0])
            point = lines[line]
            point[i] = centers[line]
            return torch.lerp(low, high, point)
    return None


@torch.no_grad()
def is_periodic(
    function: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    i: int,
) -> bool:
    """Return whether values and slopes along coordinate i are equal at the two ends."""
    x = spread_points(low, high, 50).repeat(3, 1)
    x[:50, i] = low[i]
    x[50:100, i] = high[i]
    axes = torch.eye(len(low), dtype=torch.float64)
    for values in jet_of_function(function, x, axes[i : i + 1], 1, None):
        at_low, at_high, _ = values.split(50, dim=-2)
        jump = (at_low - at_high).abs().max()
        if jump > PERIODIC * values.abs().max():
            return False
    return True


def _count_outside(
    model: nn.Module,
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    low: Tensor,
    high: Tensor,
    periodic: Collection[int],
) -> int:
    """Return the number of points outside of the box at which a term calls the model, not by `jet`.

    Periodic coordinates have no outside.
    """
    margin = NEAR * (high - low)
    margin[list(periodic)] = math.inf
    counts = [0]

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        is_outside = (x < low - margin) | (x > high + margin)
        counts.append(int(is_outside.any(-1).sum()))

    with first_module(model, HardConstraint).register_forward_pre_hook(check):
        _evaluate(function, model, rows)
    return max(counts)


def _evaluate(
    function: Callable[..., Tensor],
    model: nn.Module,
    rows: Sequence[Tensor],
) -> Tensor:
    """Evaluate a term with its graph, in float64."""
    copies = []
    for row in rows:
        copy = row.detach()
        if copy.is_floating_point():
            copy = copy.double()
        copies.append(copy.requires_grad_(row.requires_grad))
    with torch.enable_grad(), Intercepted():
        return function(model, *copies)


def _find_untrained(
    model: nn.Module,
    terms: Sequence[Any],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the leaves of the graphs of residuals that are neither points nor parameters of the model."""
    seen: set[Any] = set(map(id, model.parameters()))
    for number, (function, rows, _) in enumerate(terms):
        name = f"Term {number - 1} of `terms`" if number else "`residual`, `lift` or `distance`"
        trial = [row[torch.arange(TRIAL_ROWS) % len(row)] for row in rows]
        residuals = _evaluate(function, model, trial)
        nodes = [residuals.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            leaf = getattr(node, "variable", None)  # of the nodes that accumulate gradients
            if leaf is not None and id(leaf) not in seen and TRIAL_ROWS not in leaf.shape:
                seen.add(id(leaf))
                yield name, leaf


def find_unmet(
    first: dict[int, float],
    last: dict[int, float],
    size: float,
) -> Iterator[str]:
    """Yield a message for each condition whose residual is hardly below that of an untrained network.

    Args:
        first, last: The losses of the conditions before and after the training, by the number of the term.
        size: The first loss of the equation. Conditions that always hold have far smaller losses, by rounding.
    """
    for number, loss in last.items():
        if loss > UNMET**2 * first[number] > ROUNDING * size:
            ratio = math.sqrt(loss / first[number])
            yield (
                f"Term {number} of `terms` ends at {ratio:.1g} of its residual before training, and the solution is "
                "likely wrong. Give it a larger weight, or divide the equation by its size."
            )


def describe_outcome(result: Solution, scale: float) -> str:
    """Return advice if the error is large, or unknown with a large residual; empty otherwise.

    `scale` is the residual of a network that was not trained.
    """
    reason = result.phases[-1].reason
    if reason == "callback":
        return ""
    ratio = result.residual / scale
    is_known = not math.isnan(result.error)
    if result.error <= LARGE_ERROR or (not is_known and ratio <= SMALL_RESIDUAL):
        return ""
    end = "The budget ended" if reason == "budget" else "The training stalled"
    where = f"at {ratio:.1g} of the residual of an untrained network, with an unknown error: the solution may be wrong"
    if is_known:
        where = f"with an estimated error of {result.error:.1g} of the solution"
    return f"{end} {where}. Try `continuation=` from an easier equation, another `network=`, or more `seconds`."
