# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Points in boxes and on their sides, and points where the residual is large."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..kan.knots import KnotMap
from ..modules.checks import check_count, check_function, check_number
from .boxes import Side, check_box, check_sides, sides_of_box
from .weights import residual_norms


@torch.inference_mode(False)  # a tensor made in that mode is of no use in training
def box_points(low: Sequence[float], high: Sequence[float], count: int, *, seed: int = 0) -> Tensor:
    """Points spread evenly over a box (scrambled Sobol points), float64 (count, I).

    Args:
        low, high: The ends of the box, I numbers each.
        count: The number of points.
        seed: The same seed gives the same points.

    Raises:
        ValueError: The box is empty, or `count` is below 1.

    Example:
        >>> from peft_lotra.pde import box_points
        >>> box_points((-1, 0), (1, 1), 100).shape
        torch.Size([100, 2])
    """
    low_end, high_end = check_box(low, high)
    engine = SobolEngine(len(low_end), scramble=True, seed=check_count(seed, "seed", low=0))
    share = engine.draw(check_count(count, "count"), dtype=torch.float64)
    return low_end + (high_end - low_end) * share


@torch.inference_mode(False)
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
    low_end, high_end = check_box(low, high)
    points, normals = [], []
    for number, (coordinate, end) in enumerate(check_sides(sides, sides_of_box(len(low_end)))):
        found = box_points(low, high, count, seed=seed + number)
        found[:, coordinate] = (low_end if end == "low" else high_end)[coordinate]
        normal = torch.zeros_like(found)
        normal[:, coordinate] = -1.0 if end == "low" else 1.0
        points.append(found)
        normals.append(normal)
    return torch.cat(points), torch.cat(normals)


class ResidualSampler:
    r"""Collocation points that are drawn anew, some of them where the residual is large.

    Of the `count` points, the share `share` is drawn from `pool` times as many candidates with probability
    proportional to |r|, and the rest is spread evenly over the box.

    Args:
        low, high: The ends of the box, I numbers each.
        count: The number of points.
        share: The share of the points that follow the residual, 0 to 1.
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
        >>> kan = KAN([2, 5, 1]).double()
        >>> sampler = ResidualSampler((-1, -1), (1, 1), 200)
        >>> sampler.draw(lambda x: laplacian(kan, x) - 1).shape
        torch.Size([200, 2])
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        count: int,
        *,
        share: float = 0.3,
        pool: int = 4,
        seed: int = 0,
    ) -> None:
        self.low, self.high = check_box(low, high)
        self.count, self.pool, self.seed = check_count(count, "count"), check_count(pool, "pool"), seed
        self.share = check_number(share, "share", "[0, 1]")

    @torch.inference_mode(False)
    def draw(self, residual: Callable[[Tensor], Tensor], knots: KnotMap | None = None) -> Tensor:
        """The next points.

        Args:
            residual: Takes points (n, I) to residuals (n,) or (n, m).
            knots: A map of the box's coordinates. Half of the evenly spread points, and of the candidates, are then
                spread evenly in its outputs, so that they are dense where the knots are.

        Returns:
            Points (count, I), float64.
        """
        check_function(residual, "residual")
        followed = round(self.share * self.count)
        points = self._spread(self.count - followed, self.seed + 1, knots)
        if followed:
            candidates = self._spread(self.pool * followed, self.seed + 2, knots)
            size = residual_norms(residual(candidates), candidates).double()
            chance = size / size.max().clamp(min=torch.finfo(size.dtype).tiny)
            generator = torch.Generator().manual_seed(self.seed + 2)
            chosen = torch.multinomial(chance + 1e-12, followed, generator=generator)
            points = torch.cat([points, candidates.detach()[chosen]])
        self.seed += 2
        return points

    def _spread(self, count: int, seed: int, knots: KnotMap | None) -> Tensor:
        if not count:
            return self.low.new_empty(0, len(self.low))
        share = SobolEngine(len(self.low), scramble=True, seed=seed).draw(count, dtype=torch.float64)
        if knots is not None:
            ends = knots.low.double(), knots.high.double()
            share[1::2] = (knots.inverse(torch.lerp(*ends, share[1::2])) - ends[0]) / (ends[1] - ends[0])
        return self.low + (self.high - self.low) * share
