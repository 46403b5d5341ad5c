# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adaptation to a solution: more points where the residual is large, smaller weights where the solution is steep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..least_squares.problem import check_residuals
from ..modules.checks import check_count, check_number
from .boxes import Inside, check_box, spread_points


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
    def draw(self, residual: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the next points.

        Args:
            residual: Maps points (n, I) to residuals (n,) or (n, m).

        Returns:
            Points (count, I), float64.
        """
        count = round(self.share * self.count)
        box = self.low, self.high
        points = spread_points(*box, self.count - count, self.inside, self.seed + 1)
        if count:
            candidates = spread_points(*box, self.pool * count, self.inside, self.seed + 2)
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
    scale: float,
    directions: Tensor | None = None,
) -> Tensor:
    """Return w = 1 / (1 + scale |grad u|), (n, 1). It keeps a shock, whose residual is large, from dominating.

    `scale` is the inverse of the slope at which the weight is 1/2. `directions` (D, I) are those of the derivatives,
    all coordinates by default. All outputs count.

    Source: L. Liu et al., "Discontinuity computing using physics-informed neural networks", arXiv 2206.03864.
    """
    _, slopes = jet(model, x, directions, order=1)
    slopes = slopes.reshape(len(slopes), len(x), -1)  # of a model that returns (n,), too
    steepness = slopes.square().sum((0, 2)).sqrt()
    return 1 / (1 + scale * steepness.unsqueeze(1))
