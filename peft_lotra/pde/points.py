# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Points in boxes and on their sides, and points where the residual is large."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..kan.knots import KnotMap
from ..modules.checks import check_count, check_function, check_number, check_seed
from .boxes import Side, check_box, check_sides, sides_of_box
from .weights import residual_norms


METHODS = ("sobol", "latin", "uniform")


@torch.inference_mode(False)  # a tensor made in that mode is of no use in training
def box_points(
    low: Sequence[float], high: Sequence[float], count: int, *, method: str = "sobol", seed: int = 0
) -> Tensor:
    """Points in a box, float64 (count, I).

    Args:
        low, high: The ends of the box, I numbers each.
        count: The number of points.
        method: "sobol" (scrambled Sobol points), "latin" (a Latin hypercube: one point in each of `count` slices of
            each coordinate) or "uniform" (independent points).
        seed: The same seed gives the same points.

    Raises:
        ValueError: The box is empty, `count` is below 1, or the method is unknown.

    Example:
        >>> from peft_lotra.pde import box_points
        >>> box_points((-1, 0), (1, 1), 100).shape
        torch.Size([100, 2])
    """
    low_end, high_end = check_box(low, high)
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}, but must be one of {METHODS}.")
    count, seed, size = check_count(count, "count"), check_seed(seed), len(low_end)
    generator = torch.Generator().manual_seed(seed)
    if method == "sobol":
        share = SobolEngine(size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    else:
        share = torch.rand(count, size, dtype=torch.float64, generator=generator, device="cpu")
    if method == "latin":
        slices = torch.stack([torch.randperm(count, generator=generator, device="cpu") for _ in range(size)], 1)
        share = (slices + share) / count
    return low_end + (high_end - low_end) * share


@torch.inference_mode(False)
def side_points(
    low: Sequence[float],
    high: Sequence[float],
    count: int,
    sides: Sequence[Side] | None = None,
    *,
    method: str = "sobol",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Points on sides of a box, and the outward normals there, for conditions that are terms of the loss.

    Args:
        low, high, method, seed: As for `box_points`.
        count: The number of points on each side.
        sides: Pairs (coordinate, end) of an index and "low" or "high"; None for all of them.

    Returns:
        Points and unit normals, float64 (sides count, I) each, side after side.

    Raises:
        ValueError: As `box_points`, or a side is none of the box.

    Example:
        >>> from peft_lotra.pde import side_points
        >>> points, normals = side_points((-1, 0), (1, 1), 50, sides=[(0, "low"), (0, "high")])
        >>> points.shape, normals[0].tolist()
        (torch.Size([100, 2]), [-1.0, 0.0])
    """
    low_end, high_end = check_box(low, high)
    points, normals = [], []
    for number, (coordinate, end) in enumerate(check_sides(sides, sides_of_box(len(low_end)))):
        found = box_points(low, high, count, method=method, seed=seed + number)
        found[:, coordinate] = (low_end if end == "low" else high_end)[coordinate]
        normal = torch.zeros_like(found)
        normal[:, coordinate] = -1.0 if end == "low" else 1.0
        points.append(found)
        normals.append(normal)
    return torch.cat(points), torch.cat(normals)


class ResidualSampler:
    r"""Collocation points that are drawn anew, some of them where the residual is large.

    Of the `count` points, the share `share` is drawn from `pool` times as many candidates with probability
    proportional to |r|^power, and the rest is spread evenly over the box. A second set of `count / 4` points, spread
    evenly, is held out: `fit(..., held=...)` of `LevenbergMarquardt` shows what the residual is between the points.

    Args:
        low, high: The ends of the box, I numbers each.
        count: The number of points.
        share: The share of the points that follow the residual, 0 to 1.
        power: How strongly they follow it.
        pool: Candidates for each point.
        seed: Each draw changes it.

    Raises:
        ValueError: An argument is out of range, or the residual is not finite or has a wrong shape.

    Source: C. Wu et al., "A comprehensive study of non-adaptive and residual-based adaptive sampling for
    physics-informed neural networks", arXiv 2207.10289.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, laplacian
        >>> from peft_lotra.pde import ResidualSampler
        >>> kan, sampler = KAN([2, 5, 1]).double(), ResidualSampler((-1, -1), (1, 1), 200)
        >>> points, held = sampler.draw(lambda x: laplacian(kan, x) - 1)
        >>> points.shape, held.shape
        (torch.Size([200, 2]), torch.Size([50, 2]))
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        count: int,
        *,
        share: float = 0.3,
        power: float = 1.0,
        pool: int = 4,
        seed: int = 0,
    ) -> None:
        self.low, self.high = check_box(low, high)
        self.count, self.pool, self.seed = check_count(count, "count", low=4), check_count(pool, "pool"), seed
        self.share, self.power = check_number(share, "share", "[0, 1]"), check_number(power, "power", "[0, inf)")

    @torch.inference_mode(False)
    def draw(self, residual: Callable[[Tensor], Tensor], knots: KnotMap | None = None) -> tuple[Tensor, Tensor]:
        """The next points.

        Args:
            residual: Takes points (n, I) to residuals (n,) or (n, m).
            knots: A map of the box's coordinates. Half of the evenly spread points, and of the candidates, are then
                spread evenly in its outputs, so that they are dense where the knots are.

        Returns:
            Points (count, I) and held-out points (count / 4, I), float64.
        """
        check_function(residual, "residual")
        followed = round(self.share * self.count)
        points = self._spread(self.count - followed, self.seed + 1, knots)
        held = self._spread(self.count // 4, self.seed + 2, None)
        if followed:
            candidates = self._spread(self.pool * followed, self.seed + 3, knots)
            size = residual_norms(residual(candidates), "residual", candidates).double()
            chance = (size / size.max().clamp(min=torch.finfo(size.dtype).tiny)).pow(self.power)
            generator = torch.Generator().manual_seed(self.seed + 3)
            chosen = torch.multinomial(chance + 1e-12, followed, generator=generator)
            points = torch.cat([points, candidates.detach()[chosen]])
        self.seed += 3
        return points, held

    def _spread(self, count: int, seed: int, knots: KnotMap | None) -> Tensor:
        if not count:
            return self.low.new_empty(0, len(self.low))
        share = SobolEngine(len(self.low), scramble=True, seed=seed).draw(count, dtype=torch.float64)
        if knots is not None:
            ends = knots.low.double(), knots.high.double()
            share[1::2] = (knots.inverse(torch.lerp(*ends, share[1::2])) - ends[0]) / (ends[1] - ends[0])
        return self.low + (self.high - self.low) * share
