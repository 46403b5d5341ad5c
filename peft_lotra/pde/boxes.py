# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Boxes: ends and sides as arguments, and points in boxes and on their sides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..kan.basis import in_transform
from ..modules.calls import is_tracing
from ..modules.checks import check_count


Side = tuple[int, str]  # the index of a coordinate, and "low" or "high"
Inside = Callable[[Tensor], Any]  # points (n, I) to (n,) bool
SMALLEST_SHARE = 1e-4  # of a box that is inside; below it, the search for points takes too long
CANDIDATES = 2**16  # points that estimate the share
BISECTIONS = 50  # reach rounding
ROUNDING = 1e-5  # of a width, by which float32 may be outside of a box


def check_box(
    low: Sequence[float],
    high: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return the ends of a box as float64 tensors (I,); raise a `ValueError` if it is empty or not finite."""
    low_end = torch.as_tensor(low, dtype=torch.float64, device="cpu").detach()
    high_end = torch.as_tensor(high, dtype=torch.float64, device="cpu").detach()
    is_box = low_end.dim() == 1 and low_end.shape == high_end.shape and len(low_end) > 0
    width = high_end - low_end if is_box else torch.zeros(1)
    if not (width > 0).all() or not width.isfinite().all():
        raise ValueError(
            f"`low` is {low} and `high` is {high}, but they must be equally many finite numbers, at least one, and "
            "each `low` below its `high`."
        )
    return low_end, high_end


def find_outside(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    free: Collection[int] = (),
) -> str:
    """Describe the first number of x (..., I) outside of a box; empty without any, in transforms, and if compiled.

    Coordinates in `free` have no outside.
    """
    if is_tracing() or in_transform() or x.is_meta:
        return ""
    points = x.detach().to(low)
    slack = ROUNDING * (high - low)
    is_outside = (points < low - slack) | (points > high + slack)
    is_outside[..., list(free)] = False
    if not is_outside.any():
        return ""
    index = is_outside.nonzero()[0].tolist()
    value = points[tuple(index)].item()
    *row, i = index
    return f"coordinate {i} is {value:g} in row {row}, but the box has {low[i].item():g} to {high[i].item():g}."


def warn_outside(layer: Any, x: Tensor) -> None:
    """Warn once if x is outside of the box of a layer with `low`, `high` and `periodic` coordinates."""
    if layer.has_warned:
        return
    outside = find_outside(x, layer.low, layer.high, layer.periodic)
    if outside:
        layer.has_warned = True
        warnings.warn(f"The equation was not solved at x, outside of the box: {outside}", stacklevel=4)


def sides_of_box(count: int) -> list[Side]:
    """Return all sides of a box of `count` coordinates."""
    return [(i, end) for i in range(count) for end in ("low", "high")]


def check_sides(
    sides: Sequence[Side] | None,
    of_box: list[Side],
    argument: str = "sides",
) -> list[Side]:
    """Return the sides, each once, by default all of them; raise a `ValueError` for one that the box does not have."""
    if sides is None:
        return of_box
    for side in sides:
        if side not in of_box:
            raise ValueError(f"`{argument}` has {side!r:.100}, which is none of {of_box}.")
    return list(dict.fromkeys(sides))


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


def spread_points(
    low: Tensor,
    high: Tensor,
    count: int,
    inside: Inside | None = None,
    seed: int = 0,
) -> Tensor:
    """Return scrambled Sobol points of a box, or of the part of it that is inside.

    Args:
        low, high: The ends of the box, (I,).
        count, inside, seed: As for `box_points`.

    Raises:
        ValueError: Hardly any point is inside.
    """
    engine = SobolEngine(len(low), scramble=True, seed=seed)
    points = low.new_empty(0, len(low))
    drawn = 0
    while len(points) < count:
        number = count if inside is None else max(count, 1024)
        shares = engine.draw(number, dtype=torch.float64)
        candidates = torch.lerp(low, high, shares)
        if inside is not None:
            candidates = candidates[contains(inside, candidates)]
        points = torch.cat([points, candidates])
        drawn += number
        if drawn >= CANDIDATES and len(points) < SMALLEST_SHARE * drawn:
            raise ValueError(
                f"`inside` is true at {len(points)} of {drawn} points of the box. Give a box that just holds the "
                "shape."
            )
    return points[:count]


def edge_points(
    inside: Inside,
    low: Sequence[float],
    high: Sequence[float],
    count: int = 1000,
) -> Tensor:
    """Return points on the boundary of a part of a box, by bisection between points inside and outside.

    Raises:
        ValueError: Hardly any point is inside, or all are.
    """
    interior = box_points(low, high, count, inside=inside)
    x = box_points(low, high, CANDIDATES)
    exterior = x[~contains(inside, x)]
    if not len(exterior):
        raise ValueError(f"`inside` is true at all of {len(x)} points of the box: leave it out, or look at its units.")
    index = torch.arange(count) % len(exterior)
    exterior = exterior[index]
    for _ in range(BISECTIONS):
        middle = (interior + exterior) / 2
        is_inside = contains(inside, middle).unsqueeze(1)
        interior = torch.where(is_inside, middle, interior)
        exterior = torch.where(is_inside, exterior, middle)
    return interior


def box_points(
    low: Sequence[float],
    high: Sequence[float],
    count: int,
    *,
    inside: Inside | None = None,
    seed: int = 0,
) -> Tensor:
    """Return points that are spread evenly over a box (scrambled Sobol points), float64 (count, I).

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
    count = check_count(count, "count")
    seed = check_count(seed, "seed", low=0)
    return spread_points(low_end, high_end, count, inside, seed)


def side_points(
    low: Sequence[float],
    high: Sequence[float],
    count: int,
    sides: Sequence[Side] | None = None,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return points on sides of a box, and the outward normals there, for conditions as terms of the loss.

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
    low_end, high_end = check_box(low, high)
    points = []
    normals = []
    sides = check_sides(sides, sides_of_box(len(low_end)))
    for number, (i, end) in enumerate(sides):
        on_side = box_points(low, high, count, seed=seed + number)
        on_side[:, i] = low_end[i] if end == "low" else high_end[i]
        normal = torch.zeros_like(on_side)
        normal[:, i] = -1.0 if end == "low" else 1.0
        points.append(on_side)
        normals.append(normal)
    return torch.cat(points), torch.cat(normals)
