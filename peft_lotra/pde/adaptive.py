# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adaptation to a solution: more points where the residual is large, smaller weights where the solution is steep, and
more knots for `peft_lotra.kan.refine_grid` where it bends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..kan.knots import KnotMap
from ..least_squares.problem import check_residuals
from ..modules.checks import check_count, check_number
from .boxes import Inside, box_points, check_box, spread_points


SAMPLES = 128  # points in each cell of a coordinate


class ResidualSampler:
    r"""Draw collocation points, some of them where the residual is large.

    Of the `count` points, the share `share` is drawn from `pool` times as many candidates, with probability
    proportional to |r|. The others are spread evenly over the box.

    Args:
        low, high: The ends of the box, I numbers each.
        count: The number of points.
        share: The share of the points that follow the residual, 0 to 1.
        pool: Candidates for each point.
        inside: Takes points (n, I) to (n,) bool: the points are in a part of the box.
        seed: Each draw changes it.

    Raises:
        ValueError: An argument is out of range, or the residual is not finite or has a wrong shape. `inside` is true
            hardly anywhere, or returns something else.

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
        inside: Inside | None = None,
        seed: int = 0,
    ) -> None:
        self.low, self.high = check_box(low, high)
        self.count = check_count(count, "count")
        self.pool = check_count(pool, "pool")
        self.share = check_number(share, "share", "[0, 1]")
        self.inside = inside
        self.seed = seed

    @torch.inference_mode(False)
    def draw(
        self,
        residual: Callable[[Tensor], Tensor],
        knots: KnotMap | None = None,
    ) -> Tensor:
        """Return the next points.

        Args:
            residual: Maps points (n, I) to residuals (n,) or (n, m).
            knots: A map of the box's coordinates. Half of the evenly spread points, and of the candidates, are then
                spread evenly in its outputs: they are dense where the knots are.

        Returns:
            Points (count, I), float64.
        """
        count = round(self.share * self.count)
        box = self.low, self.high
        points = spread_points(*box, self.count - count, self.inside, self.seed + 1, knots)
        if count:
            candidates = spread_points(*box, self.pool * count, self.inside, self.seed + 2, knots)
            residuals = check_residuals(residual(candidates), "`residual`", len(candidates))
            size = residuals.detach().norm(dim=1)
            is_finite = size.isfinite()
            if not is_finite.all():
                point = candidates[~is_finite][0]
                raise ValueError(f"`residual` is not finite at {point.tolist()}.")

            smallest = torch.finfo(size.dtype).tiny
            largest = size.max().clamp(min=smallest)
            probability = size / largest + 1e-12
            generator = torch.Generator().manual_seed(self.seed + 2)
            index = torch.multinomial(probability, count, generator=generator)
            drawn = candidates.detach()[index]
            points = torch.cat([points, drawn])
        self.seed += 2
        return points


@torch.no_grad()
def gradient_weights(
    model: nn.Module,
    x: Tensor,
    scale: float = 0.1,
    directions: Tensor | None = None,
) -> Tensor:
    """Return w = 1 / (1 + scale |grad u|), (n, 1). It keeps a shock, whose residual is large, from dominating.

    A weight multiplies a residual. Evaluate it every few steps and pass it as one more tensor of rows, which is
    constant in a step of `LevenbergMarquardt` or of Adam.

    Args:
        model: A network, as for `jet`; of several outputs all derivatives count.
        x: Points (n, I).
        scale: The inverse of the slope at which the weight is 1/2.
        directions: The directions of the derivatives, (D, I); all coordinates by default.

    Raises:
        ValueError: `scale` is negative.

    Source: L. Liu et al., "Discontinuity computing using physics-informed neural networks", arXiv 2206.03864.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.pde import gradient_weights
        >>> gradient_weights(KAN([2, 5, 1]), torch.rand(10, 2)).shape
        torch.Size([10, 1])
    """
    scale = check_number(scale, "scale", "[0, inf)")
    _, slopes = jet(model, x, directions, order=1)
    slopes = slopes.reshape(len(slopes), len(x), -1)  # of a model that returns (n,), too
    steepness = slopes.square().sum((0, 2)).sqrt()
    return 1 / (1 + scale * steepness.unsqueeze(1))


@torch.no_grad()
def knot_density(
    model: nn.Module,
    low: Sequence[float],
    high: Sequence[float],
    cells: int = 64,
) -> Tensor:
    r"""Return the relative number of knots that each cell of each coordinate of a box needs, for `KnotMap`:

        0.4 + 0.6 m / mean(m),   m = (mean of u_ii^2 over the cell and all other coordinates)^(1 / 6).

    Args:
        model: A network of the coordinates, as for `jet`; of several outputs all count.
        low, high: The ends of the box, I numbers each.
        cells: Equal cells of each coordinate.

    Returns:
        Positive numbers (I, cells) with mean 1, float64.

    Raises:
        ValueError: The box is empty, `cells` is below 1, or the derivatives are not finite.

    Source: C. de Boor, "Good approximation by splines with variable knots II" (1974): knots that make a power of a
    derivative equal in all intervals.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.pde import knot_density
        >>> knot_density(KAN([2, 5, 1]).double(), (-1, -1), (1, 1), cells=16).shape
        torch.Size([2, 16])
    """
    low_end, high_end = check_box(low, high)
    cells = check_count(cells, "cells")
    x = box_points(low, high, cells * SAMPLES)
    _, _, bends = jet(model, x.to(next(model.parameters(), x)))
    bends = bends.to(x).view(len(low_end), len(x), -1)
    squares = bends.square().sum(-1)
    cell_of = (x - low_end) / (high_end - low_end) * cells
    cell_of = cell_of.long().clamp(max=cells - 1)  # a point may be rounded to the end
    densities = []
    for i, index in enumerate(cell_of.unbind(1)):
        means = torch.bincount(index, squares[i], cells) / torch.bincount(index, minlength=cells)
        if not means.isfinite().all():
            raise ValueError(f"The second derivatives of the model along coordinate {i} are not finite.")

        density = torch.ones_like(means)
        if means.any():
            roots = means.pow(1 / 6)
            density = roots / roots.mean()
        densities.append(0.4 + 0.6 * density)
    return torch.stack(densities)
