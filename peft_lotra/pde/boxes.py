# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Boxes: ends and sides as arguments, and points in boxes and on their sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..modules.checks import check_count


Side = tuple[int, str]  # the index of a coordinate, and "low" or "high"
Inside = Callable[[Tensor], Any]  # points (n, I) to (n,) bool
SMALLEST_SHARE = 1e-4  # of a box that is inside: fewer points are not worth their search
CANDIDATES = 2**16  # by which the share is estimated
BISECTIONS = 50  # to rounding


def check_box(low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the ends of a box as float64 tensors (I,); raise a `ValueError` if it is empty or not finite."""
    try:
        ends = torch.stack([torch.as_tensor(end, dtype=torch.float64, device="cpu").detach() for end in (low, high)])
    except (TypeError, ValueError, RuntimeError):  # text, None, or different numbers of them
        ends = torch.empty(0)
    if ends.dim() != 2 or not ends.numel() or not ((ends[0] < ends[1]) & ends.isfinite()).all():
        raise ValueError(
            f"`low` is {low} and `high` is {high}, but they must be equally many finite numbers, at least one, and "
            "each `low` below its `high`."
        )
    return ends[0], ends[1]


def sides_of_box(count: int) -> list[Side]:
    """Return all sides of a box of `count` coordinates."""
    return [(i, end) for i in range(count) for end in ("low", "high")]


def check_sides(sides: Iterable[Side] | None, of_box: list[Side], argument: str = "sides") -> list[Side]:
    """Return the sides, each once, by default all of them; raise a `ValueError` for one that the box does not have."""
    sides = list(dict.fromkeys(of_box if sides is None else sides))
    if wrong := [side for side in sides if side not in of_box]:
        raise ValueError(f"`{argument}` has {wrong[0]!r:.100}, which is none of {of_box}.")
    return sides


def contains(inside: Inside, x: Tensor) -> Tensor:
    """Return which points are inside, (n,) bool; raise a `ValueError` if `inside` returns anything else."""
    with torch.no_grad():
        mask = torch.as_tensor(inside(x))  # of shapely, an array
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"`inside` returns {mask.dtype} of shape {tuple(mask.shape)} for x of shape {tuple(x.shape)}, but must "
            "return one bool for each point, (n,)."
        )
    return mask.to(x.device)


def draw_inside(draw: Callable[[int], Tensor], count: int, inside: Inside | None) -> Tensor:
    """Return `count` of the points that `draw` takes from a box, the first ones inside.

    Raises:
        ValueError: Hardly any point is inside.
    """
    if inside is None:
        return draw(count)
    chosen: list[Tensor] = []
    drawn = left = 0
    while left < count:
        candidates = draw(max(count, 1024))
        drawn += len(candidates)
        chosen.append(candidates[contains(inside, candidates)])
        left += len(chosen[-1])
        if drawn >= CANDIDATES and left < SMALLEST_SHARE * drawn:
            raise ValueError(
                f"`inside` is true at {left} of {drawn} points of the box. Give a box that just holds the region."
            )
    return torch.cat(chosen)[:count]


def edge_points(inside: Inside, low: Sequence[float], high: Sequence[float], count: int = 1000) -> Tensor:
    """Return points on the boundary of a part of a box, by bisection between points inside and outside.

    Raises:
        ValueError: Hardly any point is inside, or all are.
    """
    within = box_points(low, high, count, inside=inside)
    x = box_points(low, high, CANDIDATES)
    beyond = x[~contains(inside, x)]
    if not len(beyond):
        raise ValueError(f"`inside` is true at all of {len(x)} points of the box: leave it out, or look at its units.")
    beyond = beyond[torch.arange(count) % len(beyond)]
    for _ in range(BISECTIONS):
        middle = (within + beyond) / 2
        is_within = contains(inside, middle).unsqueeze(1)
        within = torch.where(is_within, middle, within)
        beyond = torch.where(is_within, beyond, middle)
    return within


def box_points(
    low: Sequence[float], high: Sequence[float], count: int, *, inside: Inside | None = None, seed: int = 0
) -> Tensor:
    """Points spread evenly over a box (scrambled Sobol points), float64 (count, I).

    Args:
        low, high: The ends of the box, I numbers each.
        count: The number of points.
        inside: Takes points (n, I) to (n,) bool: the points are in a part of the box.
        seed: The same seed gives the same points.

    Raises:
        ValueError: The box is empty, or `count` is below 1. `inside` is true hardly anywhere, or returns
            something else.

    Example:
        >>> from peft_lotra.pde import box_points
        >>> box_points((-1, 0), (1, 1), 100).shape
        torch.Size([100, 2])
    """
    low_end, high_end = check_box(low, high)
    engine = SobolEngine(len(low_end), scramble=True, seed=check_count(seed, "seed", low=0))

    def draw(number: int) -> Tensor:
        return torch.lerp(low_end, high_end, engine.draw(number, dtype=torch.float64))

    return draw_inside(draw, check_count(count, "count"), inside)


def side_points(
    low: Sequence[float], high: Sequence[float], count: int, sides: Sequence[Side] | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Points on sides of a box, and the outward normals there, for conditions that are terms of the loss.

    Args:
        low, high, seed: As for `box_points`.
        count: The number of points on each side.
        sides: Pairs (coordinate, end) of an index and "low" or "high"; None for all of them.

    Returns:
        Points and unit normals, float64 (sides count, I) each, side after side.

    Raises:
        ValueError: As `box_points`, or a side is none of the box.

    Example:
        >>> from peft_lotra.pde import side_points
        >>> walls = [(0, "low"), (0, "high")]
        >>> points, normals = side_points((-1, 0), (1, 1), 50, sides=walls)
        >>> points.shape, normals[0].tolist()
        (torch.Size([100, 2]), [-1.0, 0.0])
    """
    box = check_box(low, high)
    points, normals = [], []
    for number, (coordinate, end) in enumerate(check_sides(sides, sides_of_box(len(box[0])))):
        is_high = end == "high"
        on_side = box_points(low, high, count, seed=seed + number)
        on_side[:, coordinate] = box[is_high][coordinate]
        normal = torch.zeros_like(on_side)
        normal[:, coordinate] = 2.0 * is_high - 1.0
        points.append(on_side)
        normals.append(normal)
    return torch.cat(points), torch.cat(normals)
